"""The page about Python runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow  # The README's runs each time.
def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    assert "duration=5m" in blocks[0]
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace("duration=5m", "duration=1m"), str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "GPU-hours is what no scheduler can go below" in said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.endswith("</html>\n")
    assert 50_000 < len(page) < 1_000_000
