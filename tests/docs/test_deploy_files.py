"""The dashboard, scrape config, systemd unit and proxy configs that ship fit the gateway and its defaults."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

pytest.importorskip("httptools")
pytest.importorskip("psutil")

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from chiron.cli import app
from chiron.gateway.reporting.metrics import Metrics
from chiron.gateway.reporting.status import LeaderReport, StatusSources
from chiron.gateway.settings import BatchSettings, LimitSettings, ServerSettings
from live_plane_factory import WALL_S, LivePlane

ROOT = Path(__file__).parent.parent.parent
DEPLOY = Path(str(resources.files("chiron") / "data" / "deploy"))


def families() -> list[Metric]:
    """A gateway's metrics page, as Prometheus' own parser reads it."""
    live = LivePlane()
    live.rush(2.0, per_s=5.0)
    leader = LeaderReport(
        gateway="gw-1",
        address="10.0.0.5:9443",
        term=1,
        leads_s=1.0,
        settling=False,
        relays_missing=0,
        fallback_placements=0,
        expired_requests=0,
    )
    around = StatusSources(
        url="http://127.0.0.1:8000", version="0.1.0", wall_origin_s=WALL_S, relays_started=1, leader=leader
    )
    text = Metrics(live.plane, live.journal, lambda: around).render().decode()
    return list(text_string_to_metric_families(text))


def exported() -> set[str]:
    """Names of all series and families of the page."""
    found = families()
    kinds = {"counter": "_total", "histogram": "_bucket"}
    names = {f"{family.name}{kinds.get(family.type, '')}" for family in found}
    return names | {family.name for family in found if family.type == "histogram"}


def queries() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_is_what_its_tool_writes() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import grafana_dashboard
    finally:
        sys.path.pop(0)
    assert (DEPLOY / "grafana-dashboard.json").read_text() == grafana_dashboard.text()


def test_the_dashboard_asks_only_for_metrics_that_exist() -> None:
    asked = {name for query in queries() for name in re.findall(r"chiron_\w+", query)}
    assert len(asked) > 25
    assert asked - exported() == set()


def test_the_dashboard_groups_by_labels_that_the_metrics_have() -> None:
    labels = {sample.name: set(sample.labels) for family in families() for sample in family.samples}
    grouped = [
        (name, set(by.split(", ")))
        for query in queries()
        for by, name in re.findall(r"sum by \(([^)]*)\) \((?:rate\()?(chiron_\w+)", query)
    ]
    assert len(grouped) > 25
    assert [(name, by - labels[name]) for name, by in grouped if name in labels and not by <= labels[name]] == []


def test_the_reference_lists_every_metric_and_no_other() -> None:
    page = (ROOT / "docs" / "serve.md").read_text()
    rows = [row.split(" | ")[0] for row in page.splitlines() if row.startswith("| `chiron_")]
    listed = {name for row in rows for name in re.findall(r"`(chiron_\w+)`", row)}
    own = {name.removesuffix("_bucket") for name in exported() if name.startswith("chiron_")}
    assert listed == own


def test_the_unit_gives_a_stop_more_time_than_the_gateway_takes_and_files_for_every_connection() -> None:
    unit = (DEPLOY / "chiron.service").read_text()
    values = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    assert float(values["TimeoutStopSec"]) > ServerSettings().grace_s + 10.0
    assert int(values["LimitNOFILE"]) > 2 * LimitSettings().connections_max
    assert values["KillMode"] == "mixed"


def test_the_proxies_allow_what_the_gateway_allows() -> None:
    nginx = (DEPLOY / "nginx.conf").read_text()
    caddy = (DEPLOY / "Caddyfile").read_text()
    assert f"client_max_body_size {BatchSettings().file_max_bytes >> 30}g;" in nginx
    assert f"proxy_read_timeout {LimitSettings().request_timeout_s / 3600.0:g}h;" in nginx
    assert LimitSettings().idle_s > 60.0
    assert "keepalive_timeout 60s;" in nginx
    assert "keepalive 60s" in caddy
    for text in (nginx, caddy):
        assert "/chiron/" in text
        assert "/metrics" in text


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_init_writes_the_files_and_overwrites_none(tmp_path: Path) -> None:
    target = tmp_path / "deploy"
    written = CliRunner().invoke(app, ["init", "--deploy", str(target)], catch_exceptions=False)
    assert written.exit_code == 0
    assert contents(target) == contents(DEPLOY)
    assert "kubernetes/chiron.yaml" in contents(target)
    (target / "nginx.conf").write_text("mine")
    again = CliRunner().invoke(app, ["init", "--deploy", str(target)])
    assert again.exit_code == 2
    assert (target / "nginx.conf").read_text() == "mine"


CHECKS = {
    "promtool": (["promtool", "check", "config", "prometheus.yml"], "prometheus.yml"),
    "caddy": (["caddy", "validate", "--adapter", "caddyfile", "--config", "Caddyfile"], "Caddyfile"),
    "systemd-analyze": (["systemd-analyze", "verify", "./chiron.service"], "chiron.service"),
}


@pytest.mark.parametrize("program", CHECKS)
def test_the_programs_themselves_accept_the_files(program: str, tmp_path: Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    words, name = CHECKS[program]
    text = (DEPLOY / name).read_text().replace("/usr/local/lib/chiron/bin/chiron", sys.executable)
    (tmp_path / name).write_text(text)
    (tmp_path / "admin.key").touch()
    said = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stdout + said.stderr
