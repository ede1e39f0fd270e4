"""The PostgreSQL store does what any batch store must do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from contract_of_endings import what_never_ran_expires_with_a_line, what_was_learned_is_kept
from contract_of_items import released_items_are_leased_again_first
from contract_of_validation import harmless_oddities_are_tolerated
from store_calls import Case
from store_contract import CASES
from store_sites import PostgresSite

QUICK = (
    harmless_oddities_are_tolerated,
    released_items_are_leased_again_first,
    what_never_ran_expires_with_a_line,
    what_was_learned_is_kept,
)
"""Where the two stores differ most; the rest takes many seconds."""


@pytest.mark.parametrize(
    "case",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.__name__,
)
def test_store(case: Case, postgres_place: Callable[[], PostgresSite]) -> None:
    asyncio.run(case(postgres_place()))
