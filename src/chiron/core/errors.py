"""What everybody may catch who passes on what a user wrote."""

from __future__ import annotations


class InputError(ValueError):
    """What somebody asked for or wrote cannot be used. The message names what, and what is allowed."""
