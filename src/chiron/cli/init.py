"""``chiron init``: a commented config to start from."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chiron.cli.common.extras import needs
from chiron.cli.serve import DEFAULT_CONFIG
from chiron.config.read import ConfigError, suggest

if TYPE_CHECKING:
    from chiron.gateway.settings import ModelSettings

PLACEHOLDER = "@MODEL@"
DEFAULT_ENGINE = "openvino"
DEFAULT_MODELS = {"openvino": "toy", "llamacpp": "toy", "emulated": "llama-3.1-8b"}
"""Names of models for engines that run without being told which; else ``my-model``."""
DEFAULT_ENDPOINTS = {"vllm": 8001, "sglang": 30000, "tgi": 3000, "openai": 8001}
"""Ports where engines usually listen; 8001 where that would be 8000, which is the gateway's own."""


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path(DEFAULT_CONFIG),
    engine: Annotated[
        str,
        typer.Option("--engine", "-e", help="openvino (embedded), llamacpp, emulated, vllm, sglang, tgi, openai ..."),
    ] = DEFAULT_ENGINE,
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", metavar="URL", help="An engine that runs already. Repeatable."),
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Its name in the API; engines must know it.")] = "",
    model_path: Annotated[
        str,
        typer.Option(
            "--model-path", help="A GGUF file for openvino or llamacpp; a directory or hub name for vllm or sglang."
        ),
    ] = "",
    profile: Annotated[str, typer.Option("--profile", help="Of an emulated engine (`chiron profile list`).")] = "",
    deploy: Annotated[
        Path | None,
        typer.Option(
            "--deploy",
            metavar="DIR",
            help="Instead, write a Grafana dashboard, a Prometheus scrape config, a systemd unit, and configs for "
            "nginx and Caddy into this directory.",
        ),
    ] = None,
) -> None:
    """Write a commented config: every common key with its default. An existing file is never overwritten.

    Without options it serves the embedded engine with a small toy model, whose text is noise.

    Examples:

    - `chiron init && chiron serve`

    - `chiron init --engine vllm --endpoint http://127.0.0.1:8001 --model llama-3.1-8b`

    - `chiron init --engine llamacpp --model-path qwen.gguf --model qwen`

    - `chiron init --deploy deploy`
    """
    if deploy is not None:
        _write_deploy_files(deploy)
        return
    with needs("serve"):
        from chiron.config.serve import parse_serve
        from chiron.engines.rows import ENGINES
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine!r}: {suggest(engine, ENGINES)}")
    block = model_block(engine, model or DEFAULT_MODELS.get(engine, "my-model"), endpoint or [], model_path, profile)
    # A mistake in the options is found now, not at the first start.
    parsed = parse_serve(block, directory=file.absolute().parent, file="these options")
    block += "\n" + defaults_block(parsed.models[0])
    text = template().replace(PLACEHOLDER, block).replace("THIS_FILE", str(file))
    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(text)
    except FileExistsError:
        raise ConfigError(f"{file}: exists already, and is not overwritten; name another file") from None
    typer.echo(f"{file} is written. Next: `chiron doctor {file}`, then `chiron serve {file}`", err=True)


def _write_deploy_files(directory: Path) -> None:
    """What operators need besides the config. Raises ConfigError if one of the files exists."""
    files = sorted((resources.files("chiron") / "data" / "deploy").iterdir(), key=lambda file: file.name)
    directory.mkdir(parents=True, exist_ok=True)
    if taken := [str(directory / file.name) for file in files if (directory / file.name).exists()]:
        raise ConfigError(f"--deploy: {taken[0]} exists already, and is not overwritten; name another directory")
    for file in files:
        (directory / file.name).write_bytes(file.read_bytes())
        typer.echo(str(directory / file.name))


def template() -> str:
    """The packaged config, with a place for the model."""
    return (resources.files("chiron") / "data" / "serve" / "template.toml").read_text(encoding="utf-8")


def model_block(engine: str, model: str, endpoints: list[str], model_path: str, profile: str) -> str:
    """The ``[models]`` table of one engine, with what it usually needs."""
    name = model if re.fullmatch(r"[A-Za-z0-9_-]+", model) else json.dumps(model)
    lines = [*_about(engine, endpoints, model_path), f"[models.{name}]", f"engine = {json.dumps(engine)}"]
    if not endpoints and not model_path and engine in DEFAULT_ENDPOINTS:
        endpoints = [f"http://127.0.0.1:{DEFAULT_ENDPOINTS[engine]}"]
    if endpoints:
        lines.append(f"endpoints = {json.dumps(endpoints)}")
    if engine == "command" and not endpoints:
        lines.append('command = ["my-engine", "--port", "{port}", "--model", "{model}"]')
    if model_path:
        lines.append(f"model_path = {json.dumps(model_path)}")
    if engine == "emulated" and not endpoints:
        lines.append(f"profile = {json.dumps(profile or 'llama-3.1-8b/a100/tp1')}")
    elif profile:
        raise ConfigError(f"--profile {profile!r}: belongs to --engine emulated")
    if engine in ("openvino", "llamacpp") and not endpoints:
        lines.append("# threads = 1                      # of inference; default: the engine's own choice")
    return "\n".join(lines)


def defaults_block(model: ModelSettings) -> str:
    """The defaults that depend on the engine, as comments."""
    kind = model.kinds[0].kind
    notes = {
        f"max_num_seqs = {kind.max_num_seqs}": "the engine's own setting: requests that it can run at once",
        f"price_per_gpu_hour = {kind.price_per_gpu_hour}": "",
        f"min_instances = {model.min_instances}": "0: scale to zero; requests are held while an engine starts",
        f"max_instances = {model.max_instances}": "",
    }
    return "\n".join(f"# {key:<32} # {note}" if note else f"# {key}" for key, note in notes.items())


def _about(engine: str, endpoints: list[str], model_path: str) -> list[str]:
    """Comments that say what this kind of engine means."""
    if endpoints:
        return ["# Engines that run already. Chiron routes to them, and does not start or stop them."]
    if engine in ("openvino", "llamacpp") and not model_path:
        return [
            "# Chiron starts the engine here. Without model_path it runs a toy model with random weights: it behaves",
            '# like an engine, but its text is noise. model_path = "model.gguf" names a real one.',
        ]
    if engine == "emulated":
        return ["# Engines with the timing of a profile, and text without meaning: for trying fleets without GPUs."]
    if model_path:
        return ["# Chiron starts the engines here, as many as are needed."]
    return ["# The engines that run already, as many as there are; or model_path, and Chiron starts them."]
