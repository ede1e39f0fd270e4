"""How often the laws are tried: a tenth of the examples in ``make test``, all in ``make test-slow`` and in CI."""

from __future__ import annotations

import os


def all_examples() -> bool:
    return os.environ.get("CHIRON_TEST_EXAMPLES") == "all"


def examples(full: int) -> int:
    return full if all_examples() else max(1, full // 10)
