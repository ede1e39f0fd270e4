"""A new kind of engine is one row of the table: config, fleet, health, metrics, context and limit follow from it."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("httptools")
pytest.importorskip("psutil")

from chiron.config.read import ConfigError
from chiron.config.serve import parse_serve
from chiron.engines.rows import ENGINES, EngineRow, LimitRequest
from chiron.fleet.process.fleet import ProcessSource
from chiron.gateway.settings import KindSettings
from fleet_factory import STUB
from live_gateway import ready, serving, until

MADE_UP = EngineRow(
    name="made-up",
    health_path="/alive",
    metrics_path="/numbers",
    metrics={"running": ("madeup_now",), "waiting": ("madeup_later",), "kv_capacity_tokens": ("madeup_room",)},
    part_label="shard",
    context_path="/about",
    context_keys=(("longest",),),
    limit=LimitRequest(path="/width", method="POST", body='{"sequences": LIMIT}'),
    gpu="cpu",
    max_num_seqs=12,
    max_instances=2,
    command=(
        *(*STUB, "--port", "{port}", "--heard", "{model_path}", "--answer", "/about", '{"longest": 4321}'),
        *("--answer", "/numbers", 'madeup_now 3\nmadeup_now{shard="1"} 2\nmadeup_later 1\nmadeup_room 9000\n'),
        ("--log-lines", "{threads}"),
    ),
)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> EngineRow:
    monkeypatch.setitem(ENGINES, MADE_UP.name, MADE_UP)
    return MADE_UP


def command_of(kind: KindSettings) -> tuple[str, ...]:
    assert isinstance(kind.source, ProcessSource)
    return kind.source.command


def test_a_row_is_read_by_the_config(made_up: EngineRow, tmp_path: Path) -> None:
    text = '[models.m]\nengine = "made-up"\nmodel_path = "heard"\n'
    (model,) = parse_serve(text, directory=tmp_path).models
    (kind,) = model.kinds
    assert (kind.kind.name, kind.kind.gpu, kind.kind.max_num_seqs, model.max_instances) == ("m/made-up", "cpu", 12, 2)
    command = command_of(kind)
    assert "{port}" in command
    assert command[command.index("--heard") + 1] == "heard"
    assert "--log-lines" not in command, "what nobody has said is left out with its flag"
    (threaded,) = parse_serve(text + "threads = 7\n", directory=tmp_path).models[0].kinds
    assert command_of(threaded)[-2:] == ("--log-lines", "7")
    with pytest.raises(ConfigError, match=r"engine is 'made-op'; did you mean 'made-up'"):
        parse_serve(text.replace("made-up", "made-op"), directory=tmp_path)
    with pytest.raises(ConfigError, match=r"endpoints, command or model_path is missing"):
        parse_serve('[models.m]\nengine = "made-up"\n', directory=tmp_path)


@pytest.mark.parametrize("source", ["process", "endpoints"])
def test_a_row_is_started_watched_scraped_and_told_its_limit(made_up: EngineRow, tmp_path: Path, source: str) -> None:
    heard = tmp_path / "heard"

    async def story(text: str) -> None:
        async with serving(tmp_path, text) as service:
            _, engine = await ready(service)
            await until(lambda: engine.metrics, "its metrics are read")
            assert engine.metrics == {"running": 3.0, "waiting": 1.0, "kv_capacity_tokens": 9000.0}
            await until(lambda: engine.instance.kv_capacity_tokens == 9000, "its KV capacity is believed")
            await until(lambda: engine.context_tokens == 4321, "its context is known")
            service.clock.post(lambda: engine.set_max_batch_size(7))
            await until(lambda: 'POST /width {"sequences": 7}\n' in heard.read_text(), "it was told its limit")

    if source == "process":
        asyncio.run(story(f'[models.m]\nengine = "made-up"\nmodel_path = "{heard}"\n'))
        return
    command = [
        word.format(model_path=heard, port=0) if "{port}" in word or "{model_path}" in word else word
        for word in made_up.command
        if isinstance(word, str)
    ]
    with subprocess.Popen([*command, "--announce"], stdout=subprocess.PIPE, text=True) as stub:
        assert stub.stdout is not None
        try:
            port = next(line for line in stub.stdout if "port=" in line).partition("=")[2].strip()
            asyncio.run(story(f'[models.m]\nengine = "made-up"\nendpoints = ["http://127.0.0.1:{port}"]\n'))
        finally:
            stub.kill()
