"""docs/config.md names every key of the serve config, and no key that does not exist; its examples load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("httptools")
pytest.importorskip("psutil")

from chiron.config.read import keys_of
from chiron.config.serve import ServeFile, parse_serve
from chiron.config.serve_cascades import ServeCascade, ServeCascadeSection
from chiron.config.serve_sections import ServeInstanceSection, ServeModelSection
from chiron.core.types import RequestClass
from chiron.engines.rows import ENGINES, EngineRow
from chiron.fleet.health import HealthSettings, RecoverySettings
from chiron.fleet.settings import FleetSettings, SleeperSettings
from chiron.fleet.starts import BackoffSettings
from chiron.gateway.relay.keys import Key
from chiron.gateway.relay.uplink.joining import StaySettings
from chiron.gateway.settings import (
    BatchSettings,
    KubernetesModelsSettings,
    LimitSettings,
    ServerSettings,
    TelemetrySettings,
)
from chiron.store.postgres.settings import PostgresSettings
from chiron.store.settings import StoreSettings

PAGE = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
SECTIONS = {
    "": ServeFile,
    "models": ServeModelSection,
    "cascades": ServeCascadeSection,
    "cascade": ServeCascade,
    "instances": ServeInstanceSection,
    "classes": RequestClass,
    "server": ServerSettings,
    "keys": Key,
    "limits": LimitSettings,
    "batch": BatchSettings,
    "store": StoreSettings,
    "store on PostgreSQL": PostgresSettings,
    "relays": StaySettings,
    "kubernetes": KubernetesModelsSettings,
    "telemetry": TelemetrySettings,
    "fleet": FleetSettings,
    "sleepers": SleeperSettings,
    "fleet.health": HealthSettings,
    "fleet.backoff": BackoffSettings,
    "fleet.recovery": RecoverySettings,
}
GIVEN = {"": {"cascades"}, "keys": {"admin"}, "store": {"retention"}, "store on PostgreSQL": {"retention"}}
"""Fields that are no keys."""


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_names_every_key(section: str) -> None:
    keys = set(keys_of(SECTIONS[section])) - GIVEN.get(section, set())
    assert sorted(key for key in keys if not re.search(rf"\b{key}\b", PAGE)) == []


def test_the_page_names_no_key_that_does_not_exist() -> None:
    known = {key for kind in SECTIONS.values() for key in keys_of(kind)}
    cells = re.findall(r"^\| ((?:`[a-z_.]+`(?:, )?)+) \|", PAGE, re.MULTILINE)
    named = {key.rpartition(".")[2] for cell in cells for key in re.findall(r"`(?!chiron_)([a-z_.]+)`", cell)}
    assert len(named) > 60
    assert set(ENGINES) <= named
    assert named - known - set(ENGINES) == set()


@pytest.mark.parametrize("example", re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL))
def test_the_examples_of_the_page_load(example: str) -> None:
    assert parse_serve(example, directory=Path("/nowhere")).models


@pytest.mark.parametrize("row", ENGINES.values(), ids=lambda row: row.name)
def test_the_page_has_the_limits_of_every_engine(row: EngineRow) -> None:
    usual = ENGINES["openai"]
    for key in ("max_num_seqs", "max_num_batched_tokens"):
        (cell,) = re.findall(rf"^\| `{key}` \| ([^|]*) \|", PAGE, re.MULTILINE)
        assert cell.startswith(f"{getattr(usual, key)};")
        told = "the profile's" if row.profile_key == "profile" else str(getattr(row, key))
        assert getattr(row, key) == getattr(usual, key) or f"`{row.name}` {told}" in cell
