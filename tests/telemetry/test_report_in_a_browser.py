"""The report in a real browser, where there is one: at the width of a phone, light and dark, and under a pointer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest

from chiron.telemetry.html import report_html
from result_factory import EVIL, client_run, hour

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=10000 --dump-dom"
)
PROBE = """
const all = (selector, within) => [...within.querySelectorAll(selector)];
const box = (part) => part.getBoundingClientRect();
const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow, width = view.innerWidth;
  for (const folded of all("details", page)) folded.open = true;
  const free = all("body *", page).filter((part) => !part.closest(".scroll, pre, .unseen"));
  const wide = free.filter((part) => box(part).right > width + 1).map((part) => part.outerHTML.slice(0, 120));
  const plots = all(".plot", page).filter((plot) => plot.offsetParent);
  const tips = plots.map((plot) => {
    const at = { clientX: box(plot).left + box(plot).width * 0.6, clientY: box(plot).top + 5, bubbles: true };
    const dot = plot.querySelector(".dot-mark");
    if (dot) dot.dispatchEvent(new view.PointerEvent("pointerenter", at));
    else plot.dispatchEvent(new view.PointerEvent("pointermove", at));
    return plot.querySelector(".tip:not([hidden])")?.innerText ?? "";
  });
  const overlaps = plots.flatMap((plot) => [".xt", ".yt"].flatMap((kind) => {
    const labels = all(kind, plot).map(box);
    return labels.slice(1).filter((label, i) => meet(label, labels[i])).map(() => kind + plot.dataset.y);
  }));
  const caption = () => page.querySelector("#decisions-caption")?.textContent;
  const before = caption();
  all(".policies button", page)[1]?.click();
  const said = {
    width, wide, tips, overlaps, before, after: caption(),
    scroll: page.documentElement.scrollWidth,
    boxes: all(".scroll", page).filter((part) => part.scrollWidth > part.clientWidth + 1).length,
    shown: all(".view", page).filter((part) => !part.hidden).map((part) => part.dataset.policy),
    rows: all("#decision-list tbody tr", page).length,
    paper: view.getComputedStyle(page.body).backgroundColor,
    images: all("img", page).length,
  };
  const out = document.createElement("pre");
  out.id = "said";
  out.textContent = JSON.stringify(said);
  document.body.append(out);
};
"""


def seen(page: str, folder: Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """What a browser makes of the page in a frame of that width: no window is as narrow as a phone."""
    frame = f'<iframe id="frame" style="border:0;width:{width}px;height:900px" srcdoc="{escape(page)}"></iframe>'
    (folder / "frame.html").write_text(f"<!doctype html><body>{frame}<script>{PROBE}</script></body>", encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    ran = subprocess.run(
        [str(CHROMIUM), *OPTIONS.split(), *scheme, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900",
         f"file://{folder / 'frame.html'}"],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    found = re.search(r'<pre id="said">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found, ran.stdout[-500:] + ran.stderr[-2000:]
    text = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    said: dict[str, Any] = json.loads(text)
    return said


@pytest.fixture(scope="module")
def comparison() -> str:
    return report_html([hour("llumnix", slack=2.1, pressure=False), hour("chiron", slack=1.45, lag_s=30)])


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways_and_no_labels_overlap(comparison: str, tmp_path: Path, width: int) -> None:
    said = seen(comparison, tmp_path, width)
    assert said["width"] == width
    assert said["scroll"] <= width
    assert (said["wide"], said["overlaps"]) == ([], [])
    if width == 390:
        assert said["boxes"] == 0  # Tables are cards.


def test_a_pointer_reads_values_and_buttons_change_the_policy(comparison: str, tmp_path: Path) -> None:
    said = seen(comparison, tmp_path, 1280, dark=True)
    assert len(said["tips"]) > 10
    assert said["tips"].count("") <= 1, said["tips"]  # Between the dots of a panel there is nothing to read.
    assert re.search(r"chiron, seed 0: [\d.]+ GPU-hours, [\d.]+ % in its worst class", said["tips"][0])
    assert re.search(r"time, min: 36\s+(chiron|llumnix)\s*\d+", said["tips"][1])
    assert said["shown"] == ["1"]
    assert said["before"].startswith("chiron: ")
    assert said["after"].startswith("llumnix: ")
    assert said["rows"] > 50
    assert said["paper"] == "rgb(20, 24, 29)"


def test_a_clients_page_fits_a_phone_and_names_do_nothing(tmp_path: Path) -> None:
    page = report_html([client_run(EVIL)], command=EVIL, notes=[EVIL], errors={EVIL: (3, EVIL)})
    said = seen(page, tmp_path, 390)
    assert said["scroll"] <= 390
    assert (said["wide"], said["overlaps"], said["images"]) == ([], [], 0)
