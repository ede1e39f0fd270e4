"""The SQLite store does what any batch store must do."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from store_calls import Case
from store_contract import CASES
from store_sites import sqlite_site


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_store(case: Case, tmp_path: Path) -> None:
    asyncio.run(case(sqlite_site(tmp_path / "data")))
