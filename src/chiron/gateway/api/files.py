"""``/v1/files``: uploads go to the store in pieces, contents come from it in pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from chiron.gateway.api.expiry import FORM_FIELDS, form_expiry_s
from chiron.gateway.api.form import Part, read_form
from chiron.gateway.api.resource import json_response, page, page_limit
from chiron.gateway.api.slots import Slot, Slots
from chiron.gateway.api.state import ApiState
from chiron.gateway.relay.errors import ApiError, invalid, too_large
from chiron.gateway.relay.keys import Key
from chiron.store.port import StoredFile, TooLarge, Upload

PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
"""Only files for ``batch`` are of use here; the others are stored."""
FIELDS = ("file", "purpose", *FORM_FIELDS)
FORM_OVERHEAD_BYTES = 64 << 10
"""What a form may hold besides the file."""
WRITE_BYTES = 256 << 10
FILENAME_MAX = 255
PAGE_MAX = 10_000


class Files:
    def __init__(self, state: ApiState) -> None:
        self._state = state
        self._uploads = Slots(state.limits.uploads_max, state.limits.peer_share, "files", state.wall_s)

    async def create(self, request: Request) -> Response:
        key = self._key(request)
        bytes_max = self._state.batch.file_max_bytes
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > bytes_max + FORM_OVERHEAD_BYTES:
            raise too_large("The file", bytes_max)
        with self._uploads.taken(request, key) as slot:
            try:
                return json_response(file_object(await self._receive(request, key, slot)))
            except TooLarge:
                raise too_large("The file", bytes_max) from None

    async def _receive(self, request: Request, key: Key, slot: Slot) -> StoredFile:
        fields: dict[str, str] = {}
        upload: Upload | None = None
        complete = False
        buffer = bytearray()
        try:
            async for part, piece in read_form(request, self._state.limits.upload_stall_s):
                slot.bytes += len(piece or b"")
                if part.name not in FIELDS:
                    raise _not_allowed("field", part.name, FIELDS)
                if part.name == "file":
                    if complete:
                        raise invalid("The form has more than one file.", param="file")
                    upload = upload or await self._begin(part, fields, key)
                    complete = piece is None
                    buffer += piece or b""
                    if complete or len(buffer) >= WRITE_BYTES:
                        await upload.write(bytes(buffer))
                        buffer.clear()
                elif piece is None:
                    _keep(fields, part)
            if upload is None:
                raise invalid("file is missing; the form needs a file of that name.", param="file")
            upload.purpose = _purpose(fields)
            upload.expires_after_s = form_expiry_s(fields, complete=True)
            return await upload.commit()
        except BaseException:
            if upload is not None:
                await upload.abort()
            raise

    async def _begin(self, part: Part, fields: dict[str, str], key: Key) -> Upload:
        if part.filename is None:
            raise invalid("file has no filename; send it as a file, not as a field.", param="file")
        # Some clients send the fields after the file; whether they are good ones is checked at the end, too.
        form_expiry_s(fields, complete=False)
        purpose = _purpose(fields) if "purpose" in fields else ""
        name = part.filename.replace("\\", "/").rsplit("/", 1)[-1][-FILENAME_MAX:] or "upload"
        return await self._state.store.begin_file(purpose, name, key.name, self._state.batch.file_max_bytes)

    async def list(self, request: Request) -> Response:
        key = self._key(request)
        query = request.query_params
        limit = page_limit(request, PAGE_MAX, PAGE_MAX)
        files = await self._state.store.list_files(
            key.owner, query.get("after"), limit + 1, _order(query.get("order", "desc")), query.get("purpose")
        )
        return page([file_object(file) for file in files], limit)

    async def get(self, request: Request) -> Response:
        key = self._key(request)
        return json_response(file_object(await self._state.store.get_file(request.path_params["file_id"], key.owner)))

    async def delete(self, request: Request) -> Response:
        key = self._key(request)
        file_id = request.path_params["file_id"]
        await self._state.store.delete_file(file_id, key.owner)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: Request) -> Response:
        key = self._key(request)
        file = await self._state.store.get_file(request.path_params["file_id"], key.owner)
        blocks = self._state.store.read_file(file.id, key.owner)
        # The first block is fetched here, where an error still becomes an answer.
        first = await anext(blocks, b"")
        disposition = f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}"
        return StreamingResponse(
            _joined(first, blocks),
            media_type="application/octet-stream",
            headers={"content-disposition": disposition},
        )

    def _key(self, request: Request) -> Key:
        return self._state.keys.check(authorization(request))


def authorization(request: Request) -> bytes | None:
    value = request.headers.get("authorization")
    return None if value is None else value.encode("latin-1")


def file_object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_s),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "expires_at": None if file.expires_s is None else int(file.expires_s),
        "status_details": None,
    }


def _keep(fields: dict[str, str], part: Part) -> None:
    if part.filename is not None:
        raise invalid(f"{part.name} is a file; it must be a plain field.", param=part.name)
    if part.name in fields:
        raise invalid(f"{part.name} is given twice.", param=part.name)
    fields[part.name] = part.value.decode("utf-8", "replace")


def _purpose(fields: dict[str, str]) -> str:
    purpose = fields.get("purpose")
    if purpose is None:
        raise invalid("purpose is missing; for a batch's input it is 'batch'.", param="purpose")
    if purpose not in PURPOSES:
        raise _not_allowed("purpose", purpose, PURPOSES)
    return purpose


def _order(text: str) -> Literal["asc", "desc"]:
    if text == "asc":
        return "asc"
    if text == "desc":
        return "desc"
    raise _not_allowed("order", text, ("asc", "desc"))


def _not_allowed(name: str, value: str, allowed: tuple[str, ...]) -> ApiError:
    return invalid(f"{name} is {value[:100]!r}; allowed: {', '.join(allowed)}.", param=name)


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for block in rest:
        yield block
