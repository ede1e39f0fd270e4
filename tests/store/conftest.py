"""One PostgreSQL for all tests that need one; each has a schema of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from postgres_server import Server, postgres_server, why_not

if TYPE_CHECKING:
    from store_sites import PostgresSite


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    if why := why_not():
        pytest.skip(why)
    with postgres_server() as server:
        yield server


_NUMBERS = itertools.count()


@pytest.fixture
def postgres_place(postgres: Server, tmp_path: Path) -> Callable[[], PostgresSite]:
    """Makes places with a store in a schema of their own."""
    from store_sites import postgres_site

    def make() -> PostgresSite:
        return postgres_site(postgres, f"test_{next(_NUMBERS)}", tmp_path)

    return make
