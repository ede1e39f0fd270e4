"""Make src/chiron/data/traces from the published files.

    python tools/pack_traces.py SOURCE_DIRECTORY

SOURCE_DIRECTORY holds azure2023/, mooncake_fast25/, servegen/ and lengths/ with the files named below; see
src/chiron/data/traces/LICENSES.md for where they come from. The output is the same on every run.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from chiron.workload.servegen import read_servegen
from chiron.workload.servegen_checks import TABLES

DATA = Path(__file__).parents[1] / "src" / "chiron" / "data" / "traces"


def main(source: Path) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    for kind in ("conv", "code"):
        raw = (source / "azure2023" / f"AzureLLMInferenceTrace_{kind}.csv").read_bytes()
        write_gzip(DATA / f"azure-2023-{kind}.csv.gz", raw)
    write_gzip(DATA / "mooncake-conversation.jsonl.gz", mooncake(source / "mooncake_fast25/conversation_trace.jsonl"))
    sharegpt = source / "lengths" / "sharegpt_llama31_8b_300.csv"
    write_gzip(DATA / "sharegpt-300.csv.gz", lengths(sharegpt, "input_toks", "output_toks"))
    arxiv = source / "lengths" / "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"
    write_gzip(DATA / "arxiv-summarization.csv.gz", lengths(arxiv, "num_prefill_tokens", "num_decode_tokens"))
    for size in ("m-small", "m-mid"):
        servegen(source / "servegen" / f"{size}_client_rates.parquet", DATA / f"servegen-{size}.npz")


def write_gzip(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data, 9, mtime=0))


def mooncake(path: Path) -> bytes:
    """Without ``hash_ids``: nothing here models a shared prefix, and they are most of the file."""
    keep = ("timestamp", "input_length", "output_length")
    records = (json.loads(line) for line in path.read_text().splitlines())
    return lines(json.dumps({name: record[name] for name in keep}) for record in records)


def lengths(path: Path, prompt: str, output: str) -> bytes:
    with path.open(newline="") as file:
        rows = [f"{row[prompt]},{row[output]}" for row in csv.DictReader(file)]
    return lines(["input_tokens,output_tokens", *rows])


def lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def servegen(rates: Path, out: Path) -> None:
    data = read_servegen(rates)
    # Three significant digits of a fitted shape are more than the fit is worth, and they compress.
    scale = 10.0 ** (2 - np.floor(np.log10(np.where(data.shapes > 0, data.shapes, 1.0))))
    shapes = (np.rint(data.shapes * scale) / scale).astype(np.float32)
    arrays = {name: getattr(data, name) for name in TABLES}
    np.savez_compressed(out, **{**arrays, "shapes": shapes})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
