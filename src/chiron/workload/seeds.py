"""One seed, one named generator per component: adding a component never moves the draws of another."""

from __future__ import annotations

from hashlib import sha256

import numpy as np


def generator(seed: int, name: str) -> np.random.Generator:
    digest = sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
