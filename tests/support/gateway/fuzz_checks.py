"""What fuzzing asks of forms: what counts is what went over the wire, not the object that it was made from."""

from __future__ import annotations

from email import message_from_bytes
from typing import Any

import jsonschema

FORM = "multipart/form-data"


def options_for(operation: Any) -> dict[str, Any]:
    """Options of ``call_and_validate``. A wrong object can make a right form: an empty list leaves no field."""
    from schemathesis.specs.openapi.checks import negative_data_rejection

    schemas = [body.definition["schema"] for body in operation.body if body.media_type == FORM]
    if not schemas:
        return {}
    (schema,) = schemas

    def wrong_forms_are_refused(context: Any, response: Any, case: Any) -> Any:
        return None if is_right(response.request, schema) else negative_data_rejection(context, response, case)

    return {"excluded_checks": [negative_data_rejection], "additional_checks": [wrong_forms_are_refused]}


def is_right(request: Any, schema: dict[str, Any]) -> bool:
    """Whether the form that was sent is one of ``schema``, each field once and the file a file."""
    head = b"content-type: " + request.headers.get("content-type", "").encode() + b"\r\n\r\n"
    form = message_from_bytes(head + (request.body or b""))
    if not form.is_multipart():
        return False
    fields: dict[str, Any] = {}
    for part in form.get_payload():
        name = str(part.get_param("name", header="content-disposition"))  # type: ignore[union-attr]
        if name in fields or (part.get_filename() is None) == (name == "file"):  # type: ignore[union-attr]
            return False
        text = str(part.get_payload())  # type: ignore[union-attr]
        fields[name] = int(text) if name.endswith("[seconds]") and text.isdecimal() else text
    return jsonschema.Draft202012Validator(schema).is_valid(fields)
