"""What ``chiron demo`` runs: its traffic, its gateway's config, and a description of both."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template

from chiron.cli.common.extras import missing
from chiron.cli.load.plan import scenario_plan
from chiron.config.read import ConfigError
from chiron.config.scenario import load_scenario
from chiron.load.plan import Lengths, LoadPlan

LENGTHS = Lengths(input_scale=0.1, output_scale=0.5)
"""Two cores run a toy model: the traces' times are kept, their lengths are not."""
WINDOW_MIN_S = 60.0
"""Shortest time to the batch job's deadline: the gateway takes no shorter ``completion_window``."""
OPENVINO = """engine = "openvino"
pace = "pace.json"
threads = 1"""
EMULATED = """engine = "emulated"
profile = "pace.json\""""


def instances_max() -> int:
    """Of the demo's model."""
    return max(model.max_instances for model in load_scenario(_source()).models.values())


def full_length_s() -> float:
    """Of the whole demo's traffic, seconds."""
    return max(stream.duration_s for stream in load_scenario(_source()).workload)


def demo_plan(duration_s: float, seed: int) -> LoadPlan:
    """The traffic; a shorter or longer one has a batch job and a deadline in proportion."""
    scenario = load_scenario(_source())
    share = duration_s / full_length_s()
    job = scenario.batch_job[0]
    window_s = max(WINDOW_MIN_S, scenario.classes[job.class_].deadline_s * share)
    assignments = [f"workload.{i}.duration={duration_s!r}" for i in range(len(scenario.workload))]
    assignments += [
        f"batch_job.0.requests={max(1, round(job.requests * share))}",
        f"batch_job.0.deadline={round(window_s)}",
    ]
    return scenario_plan(str(_source()), assignments, 1.0, None, seed, "api", LENGTHS)


def write_config(directory: Path, *, embedded: bool, port: int) -> str:
    """Write ``chiron.toml`` and the pace beside it; returns the config's text."""
    text = Template((_files() / "chiron.toml").read_text(encoding="utf-8")).substitute(
        engine=OPENVINO if embedded else EMULATED, port=port
    )
    (directory / "pace.json").write_text((_files() / "pace.json").read_text(encoding="utf-8"), encoding="utf-8")
    (directory / "chiron.toml").write_text(text, encoding="utf-8")
    return text


def choose_engine(wanted: str) -> bool:
    """Whether the embedded engine is used. Raises ConfigError if it is wanted and not installed."""
    lacking = missing("openvino")
    if wanted == "openvino" and lacking:
        raise ConfigError(f"--engine openvino: not installed: {', '.join(lacking)}")
    if wanted not in ("auto", "openvino", "emulated"):
        raise ConfigError(f"--engine {wanted!r}: it must be auto, openvino or emulated")
    return wanted != "emulated" and not lacking


def about_engines(embedded: bool) -> str:
    """What is real here and what is not, in a line."""
    if embedded:
        return "real OpenVINO engines, toy model (noise), paced like an invented accelerator"
    return "emulated engines: real processes, no model; timed like an invented accelerator"


def about_traffic(plan: LoadPlan) -> str:
    """What is sent, in a line."""
    items = sum(len(job.rows) for job in plan.jobs)
    return (
        f"{len(plan.single):,} chat requests as in Azure's traces of 2023, "
        f"a batch of {items:,} due in {plan.jobs[0].window_s:.0f} s"
    )


def _files() -> Path:
    return Path(str(resources.files("chiron").joinpath("data", "demo")))


def _source() -> Path:
    return _files() / "scenario.toml"
