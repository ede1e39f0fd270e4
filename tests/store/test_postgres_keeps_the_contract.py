"""The PostgreSQL store does what any batch store must do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

import store_contract as contract
from store_sites import PostgresSite

QUICK = (
    contract.harmless_oddities_are_tolerated,
    contract.released_items_are_leased_again_first,
    contract.what_never_ran_expires_with_a_line,
    contract.what_was_learned_is_kept,
)
"""Where the two stores differ most; the rest takes many seconds."""


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in contract.CASES],
    ids=lambda case: case.__name__,
)
def test_store(case: contract.Case, postgres_place: Callable[[], PostgresSite]) -> None:
    asyncio.run(case(postgres_place()))
