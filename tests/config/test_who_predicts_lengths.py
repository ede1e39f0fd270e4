"""Policies whose source predicts or knows the length of an answer are given it, others are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from chiron.config.build import setups
from chiron.config.scenario import parse_scenario

SCENARIO = """
[classes.chat]
kind = "interactive"
ttft = "5s"
itl = "200ms"

[models.llama]
instances = [{ profile = "llama-3.1-8b/a100/tp1" }]

[[workload]]
model = "llama"
class = "chat"
generate = { kind = "poisson", rate = 5, duration = "60s", lengths = { input = 700, output = 1000 } }
"""


@pytest.mark.parametrize(
    ("policy", "settings", "expected"),
    [
        ("slos-serve", "", 0.0),
        ("jitserve", "", 0.5),
        ("tempo", "", 0.5),
        ("accelgen", "", 0.5),
        ("accelgen", "length_error = 0.2", 0.2),
        ("accelgen", "predicts = false", None),
        ("autellix", "", None),
    ],
)
def test_who_predicts_lengths_is_given_them(policy: str, settings: str, expected: float | None) -> None:
    text = SCENARIO + f"\n[policies.{policy}]\n{settings}\n"
    (made,) = setups(parse_scenario(text, directory=Path()), policies=[policy], seeds=[3])
    predicted = made.workload.predicted_tokens
    if expected is None:
        assert predicted is None
    else:
        assert predicted is not None
        error = np.log(predicted / made.workload.output_tokens)
        assert error.std() == pytest.approx(expected, abs=0.1)
