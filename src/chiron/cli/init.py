"""``chiron init``: a commented config to start from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chiron.cli.common.extras import needs
from chiron.cli.serve import DEFAULT_CONFIG
from chiron.config.read import ConfigError, suggest
from chiron.engines.rows import ENGINES, EngineRow

if TYPE_CHECKING:
    from chiron.gateway.settings import ModelSettings

PLACEHOLDER = "@MODEL@"
DEFAULT_ENGINE = "openvino"
NAMES = ", ".join(ENGINES)
FILES = " or ".join(row.name for row in ENGINES.values() if row.model_default)
TIMED = " or ".join(row.name for row in ENGINES.values() if row.profile_key == "profile")


def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path(DEFAULT_CONFIG),
    engine: Annotated[
        str,
        typer.Option("--engine", "-e", help=f"One of: {NAMES}."),
    ] = DEFAULT_ENGINE,
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", metavar="URL", help="An engine that is running already. Repeatable."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The model's name in the API; the engines must serve it.")
    ] = "",
    model_path: Annotated[
        str,
        typer.Option(
            "--model-path", help=f"A GGUF file for {FILES}; a directory or a hub name for engines that load those."
        ),
    ] = "",
    ray: Annotated[
        str,
        typer.Option("--ray", metavar="ADDRESS", help="Start the engines on this Ray cluster; `auto`: this machine's."),
    ] = "",
    profile: Annotated[
        str, typer.Option("--profile", help=f"The timing of {TIMED} engines (`chiron profile list`).")
    ] = "",
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

    - `chiron init --engine vllm --model-path org/name --ray auto`

    - `chiron init --deploy deploy`
    """
    if deploy is not None:
        _write_deploy_files(deploy)
        return
    with needs("serve"):
        from chiron.config.serve import parse_serve
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine!r}: {suggest(engine, ENGINES)}")
    row = ENGINES[engine]
    block = model_block(row, model or row.sample_model, endpoint or [], model_path, profile, ray)
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
    files = {directory / name: content for name, content in _packaged(resources.files("chiron") / "data" / "deploy")}
    if taken := [str(path) for path in files if path.exists()]:
        raise ConfigError(f"--deploy: {taken[0]} exists already, and is not overwritten; name another directory")
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        typer.echo(str(path))


def _packaged(folder: Traversable, within: str = "") -> Iterator[tuple[str, bytes]]:
    """The files of a folder and of those in it, by their paths."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _packaged(entry, f"{within}{entry.name}/")
        else:
            yield within + entry.name, entry.read_bytes()


def template() -> str:
    """The packaged config, with a place for the model."""
    return (resources.files("chiron") / "data" / "serve" / "template.toml").read_text(encoding="utf-8")


def model_block(row: EngineRow, model: str, endpoints: list[str], model_path: str, profile: str, ray: str = "") -> str:
    """The ``[models]`` table of one engine, with what it usually needs."""
    name = model if re.fullmatch(r"[A-Za-z0-9_-]+", model) else json.dumps(model)
    if ray and endpoints:
        raise ConfigError(f"--ray {ray!r}: engines that run already (--endpoint) are started nowhere")
    lines = [*_about(row, endpoints, model_path, ray), f"[models.{name}]", f"engine = {json.dumps(row.name)}"]
    if not endpoints and not model_path and not ray and row.usual_port:
        endpoints = [f"http://127.0.0.1:{row.usual_port}"]
    if endpoints:
        lines.append(f"endpoints = {json.dumps(endpoints)}")
    elif row.sample_command:
        lines.append(f"command = {json.dumps(row.sample_command)}")
    if ray:
        lines.append(f"ray = {{ address = {json.dumps(ray)} }}")
    if model_path:
        lines.append(f"model_path = {json.dumps(model_path)}")
    if row.profile_key == "profile" and not endpoints:
        lines.append(f"profile = {json.dumps(profile or row.sample_profile)}")
    elif profile:
        raise ConfigError(f"--profile {profile!r}: belongs to --engine {TIMED}")
    if "{threads}" in str(row.command) and not endpoints:
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


def _about(row: EngineRow, endpoints: list[str], model_path: str, ray: str) -> list[str]:
    """Comments that say what this kind of engine means."""
    if endpoints:
        return ["# Engines that are running already. Chiron routes to them, and does not start or stop them."]
    if ray:
        return ["# Chiron starts the engines on this Ray cluster, as many as are needed (docs/ray.md)."]
    if model_path and row.profile_key != "profile":
        return ["# Chiron starts the engines here, as many as are needed."]
    if row.about:
        return [f"# {line}" for line in row.about]
    return ["# All engines that are running already; or set model_path, and Chiron starts them."]
