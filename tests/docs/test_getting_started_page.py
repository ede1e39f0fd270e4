"""docs/getting-started.md does what it says: its blocks marked ``run`` are run in order, as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("httptools")
pytest.importorskip("psutil")
pytest.importorskip("openai")

from chiron.config.serve import parse_serve
from ports import free_port

PAGE = (Path(__file__).parent.parent.parent / "docs" / "getting-started.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^<!-- (run|start) -->\n```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
START_S = 120.0


@pytest.mark.parametrize("example", re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL))
def test_the_configs_of_the_page_load(example: str) -> None:
    assert parse_serve(example, directory=Path("/nowhere")).models


def test_every_block_that_can_be_run_here_is_marked() -> None:
    assert [kind for kind, _, _ in BLOCKS].count("start") == 1
    assert len(BLOCKS) > 8
    marked = "".join(text for _, _, text in BLOCKS)
    for command in ("chiron init", "chiron doctor", "chiron serve", "chiron batch submit", "chiron explain", "openai"):
        assert command in marked


def at_port(text: str, port: int) -> str:
    """The block for a gateway on a free port instead of the default one."""
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    text = text.replace("chiron doctor\n", f"sed -i 's/^# port = 8000/port = {port}/' chiron.toml\nchiron doctor\n")
    return re.sub(r"chiron batch (\w+)", rf"chiron batch \1 --url http://127.0.0.1:{port}", text)


def wait_until_ready(port: int) -> None:
    end_s = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=60.0):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end_s, "the gateway does not become ready"
            time.sleep(0.2)


@pytest.mark.slow
def test_the_blocks_of_the_page_run_in_order(tmp_path: Path) -> None:
    port = free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    running: subprocess.Popen[bytes] | None = None
    try:
        for kind, language, block in BLOCKS:
            text = at_port(block, port)
            words = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
            if kind == "start":
                with (tmp_path / "serve.log").open("wb") as log:
                    running = subprocess.Popen(
                        words, cwd=tmp_path, env={**os.environ, "PATH": path}, stdout=log, stderr=log
                    )
                wait_until_ready(port)
                continue
            said = subprocess.run(
                words, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=180
            )
            assert said.returncode == 0, f"{text}\n{said.stdout}\n{said.stderr}"
    finally:
        if running is not None:
            running.terminate()
            running.wait(60)
    for name in ("results.jsonl", "again.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert sorted(int(line["custom_id"]) for line in lines) == list(range(200))
        assert all(line["response"]["status_code"] == 200 for line in lines)
    assert {path.name for path in (tmp_path / "deploy").iterdir()} > {"nginx.conf", "grafana-dashboard.json"}
