"""docs/policies.md and the pages below it against the policies and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chiron.config.build import settings_of
from chiron.policies.registry import POLICIES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "policies.md").read_text(encoding="utf-8")
BELOW = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "policies").glob("*.md")))


def section(heading: str) -> str:
    parts = re.split(r"^## ", BELOW, flags=re.MULTILINE)
    (found,) = [part for part in parts if part.startswith(heading)]
    return found


@pytest.mark.parametrize(
    ("policy", "heading"),
    [
        ("chiron-paper", "`chiron-paper`"),
        ("llumnix", "`llumnix`"),
        ("hpa-queue", "`hpa-queue`"),
        ("knative-kpa", "`knative-kpa`"),
        ("keda-hpa", "`keda-hpa`"),
        ("llm-d-slo", "`llm-d-slo`"),
        ("ray-serve", "`ray-serve`"),
        ("aibrix-apa", "`aibrix-apa`"),
        ("aibrix-kpa", "`aibrix-kpa`"),
        ("aibrix-optimizer", "`aibrix-optimizer`"),
        ("wva-saturation", "`wva-saturation`"),
        ("wva-queueing", "`wva-queueing`"),
        ("sageserve", "`sageserve`"),
        ("dynamollm", "`dynamollm`"),
        ("skyserve", "`skyserve`"),
        ("dynamo-planner", "`dynamo-planner`"),
        ("dynamo-batch", "`dynamo-batch`"),
        ("forecast-arima", "`forecast-arima`"),
        ("forecast-lstm", "`forecast-lstm`"),
        ("qlm", "`qlm`"),
        ("polyserve", "`polyserve`"),
        ("sarathi", "`sarathi`"),
        ("niyama", "`niyama`"),
        ("autellix", "`autellix`"),
        ("autothrottle", "`autothrottle`"),
        ("alise-like", "`alise-like`"),
        ("ooco-like", "`ooco-like`"),
        ("accelgen", "`accelgen`"),
        ("jitserve", "`jitserve`"),
        ("slos-serve", "`slos-serve`"),
        ("static", "`static`"),
    ],
)
def test_every_setting_is_listed_with_its_default(policy: str, heading: str) -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([^`]*)` \| \S.*\|$", section(heading), flags=re.MULTILINE))
    assert rows == settings_of(POLICIES[policy].settings())


def test_hpa_kv_differs_from_hpa_queue_as_said() -> None:
    queue, kv = (settings_of(POLICIES[name].settings()) for name in ("hpa-queue", "hpa-kv"))
    assert {key: value for key, value in kv.items() if queue[key] != value} == {"metric": "'kv'", "target": "0.7"}
    assert "`hpa-kv` has `metric = 'kv'` and `target = 0.7`" in section("`hpa-queue`")


def test_wva_tokens_differs_from_wva_saturation_as_said() -> None:
    saturation, tokens = (settings_of(POLICIES[name].settings()) for name in ("wva-saturation", "wva-tokens"))
    assert {key for key in tokens if saturation[key] != tokens[key]} == {"analyzer"}
    assert "`wva-tokens` has `analyzer = 'tokens'`" in section("`wva-saturation`")


def test_forecast_holt_winters_differs_from_forecast_arima_as_said() -> None:
    arima, winters = (settings_of(POLICIES[name].settings()) for name in ("forecast-arima", "forecast-holt-winters"))
    assert {key for key in winters if arima[key] != winters[key]} == {"method"}
    assert "`forecast-holt-winters` has `method = 'holt-winters'`" in section("`forecast-arima`")


def test_tempo_differs_from_jitserve_as_said() -> None:
    jitserve, tempo = (settings_of(POLICIES[name].settings()) for name in ("jitserve", "tempo"))
    assert {key: value for key, value in tempo.items() if jitserve[key] != value} == {
        "groups": "false",
        "margin": "false",
    }
    assert "`tempo` has `groups = false` and `margin = false`" in section("`jitserve`")


def rows() -> dict[str, tuple[str, str]]:
    """Policies of the table: where the name leads, and the last column."""
    found = {}
    for row in re.findall(r"^\| \[`.*$", PAGE, flags=re.MULTILINE):
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        found |= {name: (link, cells[-1]) for name, link in re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", cells[0])}
    return found


def test_the_table_has_every_policy_and_says_which_are_tuned() -> None:
    tuned = {name.removesuffix("-tuned") for name in POLICIES if name.endswith("-tuned")}
    plain = {name for name in POLICIES if not name.endswith("-tuned")}
    assert {name: last for name, (_, last) in rows().items()} == {
        name: "yes" if name in tuned else "no" for name in plain
    }


@pytest.mark.parametrize("policy", sorted(rows()))
def test_the_name_in_the_table_leads_to_the_page_that_has_it(policy: str) -> None:
    page, _, anchor = rows()[policy][0].partition("#")
    heading = next(
        part for part in re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE) if slug(part) == anchor
    )
    assert f"`{policy}`" in heading


def slug(section: str) -> str:
    return re.sub(r"[^\w -]", "", section.partition("\n")[0].lower()).replace(" ", "-")
