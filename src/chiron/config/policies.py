"""The ``[policies]`` tables, of scenario files and of the serve config alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chiron.config.read import ConfigError, keys_of, named_tables, read_record, suggest
from chiron.policies.chiron.scheduled import CLAIRVOYANT
from chiron.policies.registry import POLICIES
from chiron.policies.stages.registry import STAGE_POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChoice:
    """A policy with its settings, under the label that results show."""

    policy: str
    settings: Any
    stages: str = ""
    """The stage policy below it, by name; empty: it runs whole instances."""
    stage_settings: Any = None


def check_can_be_made(choice: PolicyChoice, path: str, *, live: bool = False) -> PolicyChoice:
    """Raises ConfigError where the policy needs a library that is not installed, or decides about the steps of engines
    that let nobody (``live``, and pipelines of stages)."""
    if choice.policy == CLAIRVOYANT:
        return choice
    try:
        made = POLICIES[choice.policy].make(choice.settings)
    except ImportError as error:
        raise ConfigError(f"{path}: {error}") from None
    if made.compose is not None and (live or choice.stages):
        where = "a gateway's engines" if live else "stages"
        raise ConfigError(
            f"{path}: {made.name!r} decides who gets the tokens of each step inside the engine, which {where} let "
            "nobody; it can be simulated, with whole instances"
        )
    return choice


def read_policies(table: Mapping[str, Any]) -> dict[str, PolicyChoice]:
    """The tables ``[policies.LABEL]``."""
    allowed = {"policy", "stages", *(key for entry in POLICIES.values() for key in keys_of(entry.settings))}
    return {label: read_policy(label, each) for label, each in named_tables(table, "policies", allowed=allowed).items()}


def read_policy(label: str, table: object) -> PolicyChoice:
    path = f"policies.{label}"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: {table!r} must be a table of settings")
    policy = table.get("policy", label)
    if not isinstance(policy, str) or policy not in POLICIES:
        where = f"{path}.policy" if "policy" in table else path
        raise ConfigError(f"{where}: unknown policy {policy!r}; {suggest(str(policy), POLICIES)}")
    settings = {key: value for key, value in table.items() if key not in ("policy", "stages")}
    stages, stage_settings = _read_stages(table.get("stages", ""), f"{path}.stages")
    return PolicyChoice(
        policy=policy,
        settings=read_record(POLICIES[policy].settings, settings, path),
        stages=stages,
        stage_settings=stage_settings,
    )


def _read_stages(value: object, path: str) -> tuple[str, Any]:
    """A stage policy: its name, or a table with ``policy`` and its settings."""
    table = {"policy": value} if isinstance(value, str) else value
    if value == "":
        return "", None
    if not isinstance(table, Mapping) or "policy" not in table:
        raise ConfigError(
            f"{path}: {value!r} must be the name of a stage policy, or a table with policy and its settings"
        )
    name = table["policy"]
    if not isinstance(name, str) or name not in STAGE_POLICIES:
        raise ConfigError(f"{path}: unknown stage policy {name!r}; {suggest(str(name), STAGE_POLICIES)}")
    settings = {key: each for key, each in table.items() if key != "policy"}
    return str(name), read_record(STAGE_POLICIES[str(name)].settings, settings, path)
