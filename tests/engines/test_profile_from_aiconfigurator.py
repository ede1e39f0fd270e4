"""Sampling aiconfigurator gives the packaged profiles back. Needs the extra ``aic``."""

from __future__ import annotations

import pytest

pytest.importorskip("aiconfigurator_core")

from chiron.engines.profile import ProfileError
from chiron.engines.profile_aic import profile_from_aic
from chiron.engines.profile_store import load_profile

MODEL = "meta-llama/Meta-Llama-3.1-8B"


def test_the_same_tables_give_the_same_profile() -> None:
    made = profile_from_aic(MODEL, "h100_sxm", "vllm", 1)
    ours = load_profile("llama-3.1-8b/h100/tp1")
    for batch, context in ((1, 128), (64, 1024), (128, 2048)):
        made_s = made.step_s(decoding=batch, context_tokens=batch * context, prefill_tokens=512)
        assert made_s == pytest.approx(
            ours.step_s(decoding=batch, context_tokens=batch * context, prefill_tokens=512), rel=0.02
        )
    assert made.kv_bytes_per_token == ours.kv_bytes_per_token
    assert made.kv_capacity_tokens == pytest.approx(ours.kv_capacity_tokens, rel=0.05)
    assert made.gpu == "h100"


@pytest.mark.parametrize(
    ("system", "backend", "tp", "words"),
    [
        ("h900", "vllm", 1, "system 'h900' is unknown"),
        ("h100_sxm", "llamacpp", 1, "backend 'llamacpp' is unknown; allowed: vllm"),
        ("h100_sxm", "vllm", 0, "tp is 0"),
        ("l4", "vllm", 1, "cannot model model=meta-llama/Meta-Llama-3.1-8B system=l4"),
    ],
)
def test_what_the_tables_lack_is_an_error(system: str, backend: str, tp: int, words: str) -> None:
    with pytest.raises(ProfileError, match=words):
        profile_from_aic(MODEL, system, backend, tp)
