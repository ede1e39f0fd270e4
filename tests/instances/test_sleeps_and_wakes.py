"""A gateway before emulated engines that sleep: models take turns on one GPU, and no request is lost to it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from chiron.config.read import ConfigError
from chiron.config.serve import load_serve, parse_serve
from chiron.fleet.process.fleet import ProcessSource
from chiron.gateway.service import Service
from chiron.net.client import Origin
from chiron.runtime.replay import replay
from chiron.telemetry.event_log import read_event_log
from fleet_factory import kill
from live_gateway import COMPLETIONS, serving, until

POLICY = """
policy = "quick"
[policies.quick]
policy = "chiron"
tick = "200ms"
hold = "500ms"
keep_last = "1s"
prior = 1
prior_load = 0.1
"""


def gateway(*, more: str = "") -> str:
    models = "".join(
        f"""
[models.{name}]
engine = "emulated"
profile = "llama-3.1-8b/a100/tp1"
min_instances = 0
max_instances = 1
gpu = "toy"
sleeper_gb = 20
args = ["--start-delay", "1", "--sleep-s", "0", "--wake-s", "0.05"]
{more}
"""
        for name in ("a", "b")
    )
    return f"{POLICY}{models}\n[gpus]\ntoy = 1\n[sleepers]\nhost_memory_gb = 40\n"


async def ask(service: Service, model: str) -> int:
    origin = Origin(service.url, keepalive=False)
    try:
        content = {"model": model, "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
        answer = await origin.fetch("POST", COMPLETIONS, body=json.dumps(content).encode(), timeout_s=60.0)
        return answer.status
    finally:
        await origin.close()


def asleep(service: Service, model: str) -> int:
    return sum(service.plane.models[model].asleep.values())


def engines(service: Service) -> dict[str, int]:
    """The process of each model that has an instance."""
    usage = service.engines.report().usage
    instances = service.plane.instances
    return {instances[number].model: each.pid for number, each in usage.items() if number in instances}


@pytest.mark.slow
def test_two_models_take_turns_on_one_gpu(tmp_path: Path) -> None:
    async def story() -> None:
        async with serving(tmp_path, gateway(), changes=["telemetry.input_log=inputs.jsonl"]) as service:
            assert await ask(service, "a") == 200
            await until(lambda: "a" in engines(service), "its process is known")
            first = engines(service)["a"]
            # It is idle, and goes to sleep; the one GPU is free for the other model.
            await until(lambda: asleep(service, "a") == 1, "it sleeps")
            assert await ask(service, "b") == 200
            await until(lambda: asleep(service, "b") == 1, "that sleeps, too")
            assert await ask(service, "a") == 200
            await until(lambda: "a" in engines(service), "its process is known")
            assert engines(service)["a"] == first, "it woke"
            state = service.plane.models["a"]
            assert state.start_s["memory"] < 1.0 < state.cold_start_s, "the policy is told of both"
            page = service.metrics.render().decode()
            assert 'chiron_instance_wakes_total{kind="a/emulated",model="a"} 1.0' in page
            assert 'chiron_instances_asleep{kind="b/emulated",model="b"} 1.0' in page
            assert 'chiron_sleepers_memory_bytes{kind="b/emulated",model="b"} 2e+10' in page
            assert "chiron_wake_seconds" in page

    asyncio.run(story())
    log = list(read_event_log(tmp_path / "inputs.jsonl"))
    told = [line["k"] for line in log if line["event"] == "in"]
    assert {"kinds_asleep", "instance_asleep", "instance_ready_from"} <= set(told)
    done = replay(log)
    assert not done.difference


@pytest.mark.slow
def test_no_request_is_lost_to_a_sleeper_that_is_killed_or_hangs(tmp_path: Path) -> None:
    async def story() -> None:
        more = 'stop_timeout = "500ms"'
        async with serving(tmp_path, gateway(more=more), changes=["sleepers.wake_timeout='300ms'"]) as service:
            assert await ask(service, "a") == 200
            await until(lambda: "a" in engines(service), "its process is known")
            first = engines(service)["a"]
            await until(lambda: asleep(service, "a") == 1, "it sleeps")
            kill(first, 19)  # SIGSTOP: it accepts connections, and answers nobody.
            assert await ask(service, "a") == 200, "another is started in its place"
            await until(lambda: "a" in engines(service), "its process is known")
            assert engines(service)["a"] != first
            page = service.metrics.render().decode()
            assert 'chiron_sleep_failures_total{kind="a/emulated",model="a",what="wake"} 1.0' in page
            assert await ask(service, "b") == 200
            await until(lambda: asleep(service, "b") == 1, "the other one sleeps")
            service.plane.models["b"].start_s.clear()
            (sleeper,) = service.engines.fleet._by_kind["b/emulated"]._sleepers._asleep  # type: ignore[attr-defined]
            kill(sleeper.process.pid)
            assert await ask(service, "b") == 200, "noticed or not"
            assert not service.plane.models["b"].start_s

    asyncio.run(story())


def test_the_config_says_who_sleeps(tmp_path: Path) -> None:
    (tmp_path / "chiron.toml").write_text(
        '[models.m]\nengine = "vllm"\nmodel_path = "org/m"\nsleeper_gb = 16\nenv = { A = "b" }\n'
        '[sleepers]\nhost_memory_gb = 64\nwake_timeout = "20s"\n'
    )
    config = load_serve(tmp_path / "chiron.toml")
    (kind,) = config.models[0].kinds
    source = kind.source
    assert isinstance(source, ProcessSource)
    assert source.command[-1] == "--enable-sleep-mode"
    assert source.env == {"VLLM_SERVER_DEV_MODE": "1", "A": "b"}
    assert source.sleep is not None
    assert (source.sleep.gb, source.sleep.sleep_path) == (16, "/sleep?level=1")
    assert (config.sleepers.host_memory_gb, config.sleepers.wake_timeout_s) == (64, 20.0)


MODEL: dict[str, Any] = {"engine": '"vllm"', "model_path": '"org/m"', "sleeper_gb": "16"}


@pytest.mark.parametrize(
    ("changes", "sleepers", "says"),
    [
        ({"sleeper_gb": "0"}, "host_memory_gb = 64", "sleeper_gb is 0.0; it must be above 0"),
        ({"sleeper_gb": "65"}, "host_memory_gb = 64", "it must be at most sleepers.host_memory_gb (64)"),
        ({}, "", "it must be at most sleepers.host_memory_gb (0)"),
        ({"engine": '"sglang"'}, "host_memory_gb = 64", "it belongs to engine = 'vllm' or 'emulated'"),
        (
            {"model_path": None, "endpoints": '["http://127.0.0.1:1"]'},
            "host_memory_gb = 64",
            "engines that Chiron starts",
        ),
        ({"ray": '{ address = "auto" }'}, "host_memory_gb = 64", "as processes on this machine"),
        ({"sleeper_gb": None}, "host_memory_gb = 64", "no model says what a sleeper takes of it (sleeper_gb)"),
        ({}, "host_memory_gb = -1", "host_memory_gb is -1.0; it must be 0 or more"),
        ({}, 'host_memory_gb = 64\nwake_timeout = "0s"', "wake_timeout is 0.0; it must be above 0"),
    ],
)
def test_a_config_by_which_nobody_could_sleep_is_refused(
    changes: dict[str, Any], sleepers: str, says: str, tmp_path: Path
) -> None:
    keys = {key: value for key, value in {**MODEL, **changes}.items() if value is not None}
    text = "[models.m]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()) + f"[sleepers]\n{sleepers}\n"
    with pytest.raises(ConfigError) as refused:
        parse_serve(text, directory=tmp_path)
    assert says in str(refused.value)


def test_a_user_s_own_command_is_left_as_it_is(tmp_path: Path) -> None:
    command = json.dumps([sys.executable, "-m", "vllm", "--port", "{port}"])
    text = f'[models.m]\nengine = "vllm"\ncommand = {command}\nsleeper_gb = 16\n[sleepers]\nhost_memory_gb = 64\n'
    (kind,) = parse_serve(text, directory=tmp_path).models[0].kinds
    source = kind.source
    assert isinstance(source, ProcessSource)
    assert "--enable-sleep-mode" not in source.command
    assert source.env == {"VLLM_SERVER_DEV_MODE": "1"}
