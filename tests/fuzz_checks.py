"""What fuzzing does not ask of forms."""

from __future__ import annotations

from typing import Any


def not_for_forms(operation: Any) -> dict[str, Any]:
    """Options of ``call_and_validate``: a wrong object can make a right form, as an empty list leaves no field."""
    from schemathesis.specs.openapi.checks import negative_data_rejection

    forms = any(body.media_type == "multipart/form-data" for body in operation.body)
    return {"excluded_checks": [negative_data_rejection]} if forms else {}
