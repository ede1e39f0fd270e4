"""``chiron stages``: plan, and a stage and a head as processes of their own."""

from __future__ import annotations

import asyncio
import json

import pytest

from reference import recorded
from staged_models import need_torch, prompts, tiny

need_torch()

from chiron.engines.staged.plan import LayerTimes, split  # noqa: E402
from chiron.engines.staged.weights import read_model_files  # noqa: E402
from staged_processes import StageProcess, chiron  # noqa: E402
from staged_site import announce, request  # noqa: E402


def test_a_plan_is_balanced_by_time_and_by_memory() -> None:
    files = read_model_files(tiny())
    even = LayerTimes(layers={8: (1.0,) * 4}, embedding={8: 0.0}, head={8: 2.0})
    ranges = split(files, even, "2", batch=8, dtype="float32")
    assert [str(each) for each in ranges] == ["0-2", "3-3"]
    assert [str(each) for each in split(files, even, "auto", batch=8, dtype="float32")] == ["0-2", "3-3"]
    whole = sum(place.bytes for place in files.tensors.values())
    by_memory = split(files, even, "", [whole // 2, whole], batch=8, dtype="float32")
    assert [str(each) for each in by_memory] == ["0-1", "2-3"]


@pytest.mark.slow
def test_plan_serve_and_head_from_the_command_line() -> None:
    async def main() -> None:
        with (
            StageProcess(["serve", str(tiny()), "--layers", "0-1"]) as first,
            StageProcess(["serve", str(tiny()), "--layers", "2-3"]) as second,
        ):
            stages = ["--stage", f"0-1=127.0.0.1:{first.port}", "--stage", f"2-3=127.0.0.1:{second.port}"]
            with StageProcess(["head", str(tiny()), *stages, "--served-model-name", "tiny"]) as head:
                for number, prompt in enumerate(prompts(3, seed=0)):
                    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
                    body |= {"ignore_eos": True, "return_token_ids": True}
                    status, said = await request(head.port, "/v1/completions", body)
                    assert (status, json.loads(said)["choices"][0]["token_ids"]) == (200, recorded("llama")[number])
                assert (await announce(head.port, 16 << 20))[0] == 413
            status, said = await request(first.port, "/health", None, "GET")
            assert (status, json.loads(said)["layers"]) == (200, "0-1")
            status, said = await request(first.port, "/metrics", None, "GET")
            assert b'chiron_stage_steps_total{layers="0-1"}' in said

    asyncio.run(main())
    done = chiron("stages", "plan", str(tiny()), "--stages", "2", "--json")
    planned = json.loads(done.stdout)["stages"]
    assert planned[0]["sent_bytes_per_token"] == 64 * 4
    assert planned[0]["layers"].startswith("0-")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "{model}", "--layers", "0-9"], "layers 0-9: this model has layers 0 to 3"),
        (["serve", "{model}/none", "--layers", "0-3"], "no config.json there"),
        (["head", "{model}", "--stage", "0-1=127.0.0.1:1", "--stage", "3-3"], "layers 2-2 are in no stage"),
        (["head", "{model}", "--stage", "0-3=nowhere"], "replica 'nowhere': must be HOST:PORT"),
        (["plan", "{model}", "--stages", "x"], "--stages 'x': must be a number or auto"),
    ],
)
def test_bad_input_is_an_error_at_start(arguments: list[str], said: str) -> None:
    filled = [each.replace("{model}", str(tiny())) for each in arguments]
    done = chiron("stages", *filled)
    assert done.returncode != 0
    assert said in done.stderr
