"""What transformers' own ``generate`` says, greedily, one prompt at a time in float32."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@cache
def reference_model(directory: Path, dtype: str = "float32") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of a library that is not ours, while it is imported.
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        import torch

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(1)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    model.eval()
    return model


def generated(directory: Path, prompt: list[int], tokens: int) -> list[int]:
    """The tokens that follow. Each is the likeliest by a clear margin, so that rounding cannot choose another."""
    found = clear(directory, prompt, tokens)
    assert len(found) == tokens, "two tokens are equally likely: use another prompt"
    return found


def clear(directory: Path, prompt: list[int], tokens: int) -> list[int]:
    """Likewise, up to the first one that is not."""
    import torch

    model = reference_model(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = [logits[0].topk(2).values for logits in result.logits]
    sure = next((at for at, (first, second) in enumerate(best) if float(first - second) <= 1e-4), tokens)
    return list(result.sequences[0].tolist()[len(prompt) :][:sure])


def recorded(family: str) -> list[list[int]]:
    """What it said when it was asked, for the default tests: importing it takes longer than they may. A slow test holds
    it to what it says now."""
    text = Path(__file__).with_name("greedy_tokens.json").read_text(encoding="utf-8")
    tokens: list[list[int]] = json.loads(text)[family]
    return tokens


MARGIN = 0.1
"""Of a token's logit below the reference's best one in bfloat16, in standard deviations of the logits. Both round each
operation to 8 bits, in other orders."""


def shortfalls(directory: Path, prompt: list[int], tokens: list[int], *, dtype: str = "bfloat16") -> list[float]:
    """How far each token is from what transformers would have chosen after the same ones."""
    import torch

    model = reference_model(directory, dtype)
    with torch.inference_mode():
        rows = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    chosen = rows.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    return [float(each) for each in (rows.max(dim=1).values - chosen) / rows.std(dim=1)]
