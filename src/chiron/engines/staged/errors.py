"""Errors of the staged engine.

InputError
└── StagedModelError    a model, or a split of one, that cannot be served; says what and why
"""

from __future__ import annotations

from chiron.core.errors import InputError


class StagedModelError(InputError):
    """The message names the file or the argument, the value and what is allowed."""
