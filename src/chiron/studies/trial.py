"""One simulation of a study, and what is kept of it."""

from __future__ import annotations

from ast import AST, Constant, Expr, Import, ImportFrom, parse, walk
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from chiron.policies.registry import POLICIES
from chiron.policies.stages.registry import STAGE_POLICIES
from chiron.sim.run import simulate
from chiron.sim.setup import Setup
from chiron.workload.types import Cascades, Programs, Workload

Summary = Mapping[str, Any]
"""The summary of a run (``telemetry.summary``) without ``wall_s``: the same wherever it was simulated."""

NOT_IN_KEY = ("scenario", "scenario_text", "label", "workload")
"""Fields of a setup that are names, and the workload, which counts by its content."""
BOUNDS = ("gpu_hours_bound", "gpu_hours_bound_full", "cost_bound")
CODE = ("core", "control", "engines", "fleet", "policies", "runtime", "sim", "telemetry", "workload")
"""Packages that a simulation runs."""
OWN = ("policies/chiron", "policies/rivals")
"""Folders whose files count only for the policies that run them."""
LISTS = ("policies/registry.py", "policies/starts.py")
"""Files that say which policies there are, and what tunings begin from."""
TUNED = "tuned_settings.py"
"""File of the rivals that only lists all of them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A simulation to do. Two with equal keys have equal results."""

    setup: Setup
    name: str
    """For messages."""
    with_bound: bool = False
    """Also the lower bound of GPU-hours; it takes a while."""
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a trial ended: with a summary, or with an error in words."""

    summary: Summary | None = None
    error: str = ""
    details: str = ""


def trial(setup: Setup, *, name: str = "", with_bound: bool = False) -> Trial:
    named = name or f"{setup.label or setup.policy}, seed {setup.seed}"
    return Trial(setup=setup, name=named, with_bound=with_bound, key=_key(setup, with_bound))


def simulated(setup: Setup, *, with_bound: bool) -> Summary:
    summary = dict(simulate(setup, with_bound=with_bound).summary)
    del summary["wall_s"]
    # Without a bound they are 0, which reads as a figure.
    return summary if with_bound else summary | dict.fromkeys(BOUNDS)


def workload_digest(workload: Workload | Programs | Cascades) -> str:
    """Of the requests, as they are."""
    digest = sha256()
    for field in fields(workload):
        value = getattr(workload, field.name)
        if isinstance(value, Programs | Cascades):
            value = workload_digest(value)
        digest.update(field.name.encode())
        digest.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def _key(setup: Setup, with_bound: bool) -> str:
    """Of all that the result depends on: requests, fleet, policy, seed, and the code."""
    digest = sha256(
        f"{code_digest(setup.policy, setup.stage_policy)} {with_bound} {workload_digest(setup.workload)}".encode()
    )
    for field in fields(setup):
        if field.name not in NOT_IN_KEY:
            value = getattr(setup, field.name)
            # The text of an array leaves out most of it.
            text = workload_digest(value) if isinstance(value, Workload) else repr(value)
            digest.update(f"{field.name}={text}\n".encode())
    return digest.hexdigest()[:32]


@cache
def code_digest(policy: str, stage_policy: str = "", package: Path | None = None) -> str:
    """Of the source that simulates this policy, with this one below it: what was computed by another version is
    computed anew. Another policy's own files are not among it, so that a new rival, or a change of ours, leaves what is
    known of the others as it is; nor is what only tells a reader something."""
    root = package or Path(str(resources.files("chiron")))
    digest = sha256(_of_others(root))
    if policy in POLICIES:
        digest.update(POLICIES[policy].make.__qualname__.encode())
    for path in _own_of(policy, stage_policy, root):
        digest.update(_of_file(path))
    return digest.hexdigest()


@cache
def _of_others(root: Path) -> bytes:
    """Of all that simulates but policies' own files, and what lists them."""
    digest = sha256()
    for package in CODE:
        for path in sorted((root / package).rglob("*.py")):
            if not _is_own(path, root) and path not in [root / name for name in LISTS]:
                digest.update(_of_file(path))
    return digest.digest()


def _of_file(path: Path) -> bytes:
    """Without comments and docstrings."""
    return _of_source(path.name, path.read_bytes())


@cache
def _of_source(name: str, source: bytes) -> bytes:
    """Once for all policies that share the file: there are 50,000 lines."""
    return sha256(f"{name} {_told(parse(source))}".encode()).digest()


def _told(node: Any) -> str:
    """As ``ast.dump`` has it, without what only tells a reader something, in a third of the time."""
    if isinstance(node, AST):
        kind = type(node)
        said = []
        for name in node._fields:
            value = getattr(node, name)
            # Nothing of an optional field that has no value.
            if value is not None or getattr(kind, name, ...) is not None:
                said.append(f"{name}={_told(value)}")
        return f"{kind.__name__}({', '.join(said)})"
    if isinstance(node, list):
        told = [_told(each) for each in node if not _only_tells(each)]
        return f"[{', '.join(told or ['Pass()'] if node else [])}]"
    return repr(node)


def _only_tells(node: Any) -> bool:
    return isinstance(node, Expr) and isinstance(node.value, Constant) and isinstance(node.value.value, str)


def _is_own(path: Path, root: Path) -> bool:
    return any(root / folder in path.parents for folder in OWN)


def _own_of(policy: str, stage_policy: str, root: Path) -> list[Path]:
    """Policies' own files that this one runs: that of its maker, those of its settings, and what these import. A stage
    policy is not among them, and may import one."""
    entry = POLICIES.get(policy)
    if entry is None:
        return sorted(path for folder in OWN for path in (root / folder).rglob("*.py"))
    modules = [entry.make.__module__, *(kind.__module__ for kind in entry.settings.__mro__)]
    wanted = [path for module in modules for path in _file_of(module, root)]
    if stage_policy:
        own = STAGE_POLICIES[stage_policy].decide.__module__
        path = root.joinpath(*own.split(".")[1:]).with_suffix(".py")
        wanted += [each for module in _imported(path) for each in _file_of(module, root)]
    found: dict[Path, None] = {}
    while wanted:
        path = wanted.pop()
        if path not in found:
            found[path] = None
            wanted += [each for module in _imported(path) for each in _file_of(module, root)]
    return sorted(found)


def _file_of(module: str, root: Path) -> list[Path]:
    """None if it is no policy's own. What a tuning found is in the settings themselves."""
    place = root.joinpath(*module.split(".")[1:])
    found = [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return [path for path in found if _is_own(path, root) and path.name != TUNED]


def _imported(path: Path) -> tuple[str, ...]:
    return _imports(path.read_bytes())


@cache
def _imports(source: bytes) -> tuple[str, ...]:
    found: list[str] = []
    for node in walk(parse(source)):
        if isinstance(node, Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ImportFrom) and node.module is not None:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)
