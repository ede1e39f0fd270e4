"""The toy model: same settings, same bytes; whole or absent; loads in the engines that read GGUF."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf")

import numpy as np

from chiron.engines.serve.openvino_model import ModelError, context_length
from chiron.engines.serve.toy import ToySettings, toy_model, write_toy

SMALL = ToySettings(hidden=64, layers=1, context_tokens=512)


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    seeded = ToySettings(hidden=64, layers=1, context_tokens=512, seed=1)
    contents = []
    for index, settings in enumerate((SMALL, SMALL, seeded)):
        write_toy(tmp_path / str(index), settings)
        contents.append((tmp_path / str(index)).read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_it_is_made_once_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    first = toy_model(SMALL, tmp_path / "new")
    made_ns = first.stat().st_mtime_ns
    assert toy_model(SMALL, tmp_path / "new") == first
    assert first.stat().st_mtime_ns == made_ns
    assert list((tmp_path / "new").iterdir()) == [first]


def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chiron.engines.serve.toy._write", lambda path, settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy_model(SMALL, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("field", "value"), [("hidden", 100), ("hidden", 0), ("layers", 0), ("context_tokens", 1)])
def test_a_shape_out_of_bounds_is_named(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be"):
        ToySettings(**{field: value})


def test_its_context_length_is_read_from_the_header(tmp_path: Path) -> None:
    assert context_length(toy_model(SMALL, tmp_path)) == 512


def test_its_context_length_is_read_past_lists_of_any_kind(tmp_path: Path) -> None:
    """Files from the usual converters hold tags and languages before it."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "tagged.gguf", "llama")
    writer.add_tags(["chat", "text-generation"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.lists", [[1, 2], [3]])
    writer.add_context_length(32_768)
    writer.add_tensor("weights", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert context_length(tmp_path / "tagged.gguf") == 32_768


_HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IQ", 8, 2**63),
        struct.pack("<IIQ", 9, 10, 2**63),
        struct.pack("<IIQ", 9, 8, 2**63),
        struct.pack("<I", 77),
    ],
)
def test_a_header_that_is_broken_is_refused_and_never_believed(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(_HEAD + value)
    with pytest.raises(ModelError, match="not a GGUF file"):
        context_length(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0", b"hello, world, this is no model at all"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file"):
        context_length(path)


def test_the_command_writes_it_and_says_that_it_is_noise(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    command = [sys.executable, "-m", "chiron.engines.serve.toy", str(path), "--hidden", "64", "--layers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "noise" in done.stdout
    assert path.exists()


def test_llamacpp_loads_it(tmp_path: Path) -> None:
    """In a process of its own, since the library writes to the standard streams and keeps threads."""
    pytest.importorskip("xllamacpp")
    script = (
        "import sys, xllamacpp as x; p = x.CommonParams(); p.model.path = sys.argv[1]; p.n_ctx = 512;"
        "p.cpuparams.n_threads = 1; s = x.Server(p);"
        "answer = s.handle_completions({'prompt': 'hi', 'max_tokens': 4});"
        "print('said', answer['usage']['completion_tokens'], flush=True);"
        "import os; os._exit(0)"
    )
    command = [sys.executable, "-c", script, str(toy_model(SMALL, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "said " in done.stdout, done.stderr[-2000:]
