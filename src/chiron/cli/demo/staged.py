"""``chiron demo --staged``: one model as a pipeline of stages, whose slow one each stage policy scales in a surge.

For each policy a gateway of its own gets the same traffic. The model is a real one with random weights, so its text is
noise; the slow stage is paced, so that two cores are enough.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from chiron.cli.common.extras import needs
from chiron.cli.demo.staged_verdict import Surge, found_bottleneck, policy_lines
from chiron.cli.load.plan import scenario_plan
from chiron.config.read import ConfigError
from chiron.config.serve import load_serve
from chiron.load.plan import Lengths, LoadPlan
from chiron.telemetry.result import Result

if TYPE_CHECKING:
    from chiron.load.run import LoadRun

DURATION_S = 60.0
"""Of the traffic for each policy: a third of it calm, then the surge."""
DURATION_MIN_S = 40.0
MODEL = "demo"
SLOW = "4-5"
"""Layers of the stage that is paced."""
SETTINGS = {
    "stage-hpa": 'target = 0.75, sync = "2s", rate_period = "2s", stale = "20s", stabilise_down = "8s"',
    "stage-balance": 'tick = "1s", spread = 0.0, rate_window = "6s", look_back = "4s", hold = "6s"',
}
"""Of each stage policy, beside its name."""
ABOUT = "a real model of random weights in four stages (text is noise), one paced to be slow"


def surge_of(duration_s: float) -> Surge:
    return Surge(begin_s=duration_s / 3, end_s=duration_s / 3 + 0.42 * duration_s)


def staged_plan(out: Path, duration_s: float, seed: int) -> LoadPlan:
    """The traffic for each policy; the scenario is written into the directory."""
    surge = surge_of(duration_s)
    text = Template((_files() / "scenario.toml").read_text(encoding="utf-8")).substitute(
        # Bursts begin half a period in.
        period=f"{2 * surge.begin_s:g}s",
        surge=f"{surge.end_s - surge.begin_s:g}s",
        duration=f"{duration_s:g}s",
    )
    (out / "scenario.toml").write_text(text, encoding="utf-8")
    return scenario_plan(str(out / "scenario.toml"), (), 1.0, None, seed, "api", Lengths())


def write_model(out: Path) -> None:
    """The model that all gateways serve, made anew if it is not there."""
    from chiron.engines.staged.tiny import TinySettings, write_tiny

    if not (out / "model").exists():
        write_tiny(out / "model", TinySettings(layers=8, hidden=64, heads=4, kv_heads=2))


def write_staged_config(directory: Path, policy: str, *, port: int) -> str:
    """Write ``chiron.toml``; returns the config's text."""
    text = Template((_files() / "chiron.toml").read_text(encoding="utf-8")).substitute(
        stages=f"{{ policy = {json.dumps(policy)}, {SETTINGS[policy]} }}", port=port
    )
    (directory / "chiron.toml").write_text(text, encoding="utf-8")
    load_serve(directory / "chiron.toml")
    return text


def about_staged(plan: LoadPlan, policy: str) -> str:
    return f"{policy}: {len(plan.single):,} requests, a surge of nine times the rate in the middle"


def recorded(directory: Path, run: LoadRun, policy: str, config: str) -> tuple[Result, Result]:
    """What the client measured and what the gateway recorded, under the policy's name."""
    with needs("serve"):
        from chiron.load.result import result_of
    from chiron.telemetry.store import load_result, save_result

    client = result_of(run, "client")
    save_result(client, directory / "client.chiron")
    saved = directory / "data" / "result.chiron"
    if not saved.exists():
        raise ConfigError(f"{saved} is missing: the gateway did not end well; see {directory / 'gateway.log'}")
    text = f"{config}\n\n{run.plan.text}"
    return client, replace(load_result(saved), policy=policy, scenario="live demo of stages", scenario_text=text)


def staged_verdict(directory: Path, results: dict[str, tuple[Result, Result]], surge: Surge) -> list[str]:
    """For each policy, and whether each found the slow stage."""
    (kind,) = load_serve(directory / "chiron.toml").models[0].kinds
    assert kind.kind.pipeline is not None
    most = {stage.name: stage.max_replicas for stage in kind.kind.pipeline.stages}
    lines: list[str] = []
    lacking: list[str] = []
    for policy, (client, gateway) in results.items():
        lines += policy_lines(policy, client, gateway, slow=SLOW, most=most, surge=surge)
        if not found_bottleneck(client, gateway, slow=SLOW, most=most, surge=surge):
            lacking.append(policy)
    if lacking:
        who = " and ".join(lacking)
        return [*lines, f"verdict: {who} gave the slow stage (layers {SLOW}) no more replicas than another one"]
    return [*lines, f"verdict: each policy found the slow stage (layers {SLOW}) and scaled it"]


def _files() -> Path:
    return Path(str(resources.files("chiron").joinpath("data", "demo", "staged")))
