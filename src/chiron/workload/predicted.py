"""What a length predictor says of each request, for policies that have one.

A predictor reads the text of a prompt, which no trace has. In its place stands the true length with an error: a policy
that is given these knows more than others do, and docs/policies/schedulers.md says which are.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from chiron.workload.seeds import generator
from chiron.workload.types import Workload


def with_predictions(workload: Workload, error: float, *, seed: int) -> Workload:
    """``error``: standard deviation of log(predicted / true). The same draws for every error."""
    factor = np.exp(error * generator(seed, "length predictor").standard_normal(len(workload)))
    predicted = np.maximum(1, np.rint(workload.output_tokens * factor)).astype(np.int64)
    return replace(workload, predicted_tokens=predicted)
