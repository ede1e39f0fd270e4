"""What any batch store must do: one async function per promise, run against a ``Site`` by the tests of each store."""

from __future__ import annotations

import contract_of_endings
import contract_of_files
import contract_of_items
import contract_of_validation
from store_calls import Case

CASES: list[Case] = [
    *contract_of_files.CASES,
    *contract_of_validation.CASES,
    *contract_of_items.CASES,
    *contract_of_endings.CASES,
]
