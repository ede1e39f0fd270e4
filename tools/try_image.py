"""Runs the Dockerfile's steps in a clean Debian, without a container engine, and tries what they make.

debootstrap (as root) makes the base: Debian's python3 stands in for the base image. Every step then runs in a copy of
it by chroot, which is no container: nothing is isolated but the file system, and no layers are made. In the end it
starts the image's command as the image's user, with a config that it brings along, runs the health check, and says how
large all is that was added to the base.

    sudo python3 tools/try_image.py [--base DIRECTORY]

``--base`` keeps the base and uses it again. Of a Dockerfile it knows what ours has.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
PACKAGES = "python3,python3-venv,python3-dev,ca-certificates"
"""The base image has Python's headers, too."""
OF_THE_MACHINE = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt")
"""Lent to each root, so that it finds the package index as this machine does."""
TRIES, TRY_PAUSE_S = 300, 0.2
"""Of the health check."""
CONFIG = """
[server]
open_without_keys = true
[models.m]
engine = "vllm"
endpoints = ["http://127.0.0.1:9"]
"""


@dataclass
class Stage:
    root: Path
    env: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    user: str = "0"
    healthcheck: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def argv(self, command: list[str]) -> list[str]:
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", **self.env}
        pairs = [f"{name}={value}" for name, value in env.items()]
        inside = 'mkdir -p "$0" && cd "$0" && exec "$@"' if self.user == "0" else 'cd "$0" && exec "$@"'
        shell = ["/bin/sh", "-c", inside, self.directory, *command]
        return ["chroot", f"--userspec={self.user}:{self.user}", str(self.root), "/usr/bin/env", "-i", *pairs, *shell]


def steps(text: str) -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in found)]


def ignored(path: str, rules: list[str]) -> bool:
    """As .dockerignore says: the last rule that fits a path, or a folder above it, decides."""
    parts, hidden = path.split("/"), False
    for rule in rules:
        pattern = rule.removeprefix("!")
        if pattern.startswith("**/"):
            fits = any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        else:
            fits = any(fnmatch.fnmatch("/".join(parts[: i + 1]), pattern) for i in range(len(parts)))
        if fits:
            hidden = not rule.startswith("!")
    return hidden


def copy(stage: Stage, sources: list[str], target: str, origin: Path, rules: list[str]) -> None:
    into = stage.root / os.path.normpath(os.path.join(stage.directory, target)).lstrip("/")
    for source in sources:
        base = origin / source.lstrip("/")
        many = base.is_dir()
        files = [file for file in base.rglob("*") if file.is_file() or file.is_symlink()] if many else [base]
        for file in files:
            if rules and ignored(str(file.relative_to(origin)), rules):
                continue
            end = into / file.relative_to(base) if many else (into / file.name if target.endswith("/") else into)
            end.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, end, follow_symlinks=False)


def make(base: Path, work: Path, text: str, rules: list[str]) -> Stage:
    stages: dict[str, Stage] = {}
    stage = Stage(base)
    for name, rest in steps(text):
        print(f"{name} {rest}"[:140], flush=True)
        match name:
            case "FROM":
                stage = Stage(work / f"stage-{len(stages)}")
                subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(stage.root)], check=True)
                stages[rest.partition(" AS ")[2] or str(len(stages))] = stage
            case "ENV":
                stage.env |= dict(pair.split("=", 1) for pair in rest.split())
            case "WORKDIR":
                stage.directory = rest
            case "USER":
                stage.user = rest
            case "COPY":
                words, origin, fits = rest.split(), ROOT, rules
                if words[0].startswith("--from="):
                    origin, fits = stages[words.pop(0).removeprefix("--from=")].root, []
                copy(stage, words[:-1], words[-1], origin, fits)
            case "RUN":
                subprocess.run(stage.argv(["/bin/sh", "-c", rest]), check=True)
            case "HEALTHCHECK":
                stage.healthcheck = json.loads(rest.partition("CMD ")[2])
            case "ENTRYPOINT":
                stage.entrypoint = json.loads(rest)
            case "CMD":
                stage.command = json.loads(rest)
            case "ARG" | "VOLUME" | "EXPOSE":
                pass
            case _:
                raise SystemExit(f"error: this Dockerfile has {name}, which {Path(__file__).name} does not know")
    return stage


def attempt(stage: Stage) -> None:
    """The command starts, as the user, and its health check passes."""
    version = subprocess.run(stage.argv([*stage.entrypoint, "version"]), check=True, capture_output=True, text=True)
    print("version:", version.stdout.strip())
    config = stage.root / "etc" / "chiron" / "chiron.toml"
    config.parent.mkdir(parents=True)
    config.write_text(CONFIG)
    running = subprocess.Popen(stage.argv([*stage.entrypoint, *stage.command]))
    try:
        for _ in range(TRIES):
            healthy = subprocess.run(stage.argv(stage.healthcheck), stderr=subprocess.DEVNULL).returncode == 0
            if healthy or running.poll() is not None:
                break
            time.sleep(TRY_PAUSE_S)
        if not healthy:
            raise SystemExit("error: the health check does not pass")
        user = next(
            line.split()[1] for line in Path(f"/proc/{running.pid}/status").read_text().splitlines() if "Uid" in line
        )
        print(f"the health check passes; it runs as user {user}")
    finally:
        running.terminate()
        print("stopped with status", running.wait(60))


def size_mib(path: Path) -> float:
    said = subprocess.run(["du", "-sk", "--one-file-system", str(path)], check=True, capture_output=True, text=True)
    return int(said.stdout.split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, help="where the base is, or is to be made")
    given = parser.parse_args()
    if os.geteuid():
        raise SystemExit("error: chroot needs root")
    with tempfile.TemporaryDirectory(prefix="chiron-image-") as directory:
        work = Path(directory)
        base = given.base or work / "base"
        if not (base / "usr" / "bin" / "python3").exists():
            subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(base), MIRROR], check=True
            )
        lent = work / "lent"
        subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(lent)], check=True)
        for name in OF_THE_MACHINE:
            shutil.copyfile(name, lent / name.lstrip("/"))
        rules = [line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and line[0] != "#"]
        stage = make(lent, work, (ROOT / "Dockerfile").read_text(), rules)
        print(f"added to the base: {size_mib(stage.root) - size_mib(lent):.0f} MiB")
        attempt(stage)


if __name__ == "__main__":
    sys.exit(main())
