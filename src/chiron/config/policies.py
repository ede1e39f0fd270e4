"""The ``[policies]`` tables, of scenario files and of the serve config alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chiron.config.read import ConfigError, keys_of, named_tables, read_record, suggest
from chiron.policies.registry import POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChoice:
    """A policy with its settings, under the label that results show."""

    policy: str
    settings: Any


def read_policies(table: Mapping[str, Any]) -> dict[str, PolicyChoice]:
    """The tables ``[policies.LABEL]``."""
    allowed = {"policy", *(key for entry in POLICIES.values() for key in keys_of(entry.settings))}
    return {label: read_policy(label, each) for label, each in named_tables(table, "policies", allowed=allowed).items()}


def read_policy(label: str, table: object) -> PolicyChoice:
    path = f"policies.{label}"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: {table!r} must be a table of settings")
    policy = table.get("policy", label)
    if policy not in POLICIES:
        where = f"{path}.policy" if "policy" in table else path
        raise ConfigError(f"{where}: unknown policy {policy!r}; {suggest(str(policy), POLICIES)}")
    settings = {key: value for key, value in table.items() if key != "policy"}
    return PolicyChoice(policy=policy, settings=read_record(POLICIES[policy].settings, settings, path))
