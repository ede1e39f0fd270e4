"""The base of all errors in a user's input."""

from __future__ import annotations


class InputError(ValueError):
    """What somebody asked for or wrote cannot be used. The message names what, and what is allowed."""
