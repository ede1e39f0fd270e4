"""A client of the files and batches API on the standard library: streams both ways, holds no file in memory."""

from __future__ import annotations

import http.client
import json
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

from chiron.cli.common.tls import trust_hint, trusting
from chiron.config.read import ConfigError
from chiron.net.reasons import reason_of

BLOCK_BYTES = 1 << 18
ANSWER_MAX_BYTES = 16 << 20
"""An answer that is not a file's content is never larger than this."""
TIMEOUT_S = 60.0
"""Of one read or write on the connection."""
COMMIT_TIMEOUT_S = 600.0
"""After an upload: the server makes the file durable before it answers."""

Progress = Callable[[int], None]


class ServerError(ConfigError):
    """The server is not there, or refused. The message says which, and what to do."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; 0 if there was no answer."""


class Server:
    """A gateway, or any server with OpenAI's files and batches API."""

    def __init__(self, url: str, key: str = "", cacert: Path | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.rstrip("/") not in ("", "/v1"):
            raise ConfigError(f"--url {url!r}: must be http://HOST:PORT or https://HOST:PORT")
        try:
            self._port = parts.port
        except ValueError as error:
            raise ConfigError(f"--url {url!r}: {error}") from None
        self._host = parts.hostname
        self._tls = trusting(cacert) if parts.scheme == "https" else None
        self._key = key
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def get(self, path: str, **query: str | int) -> dict[str, Any]:
        """The JSON object at ``path``. Raises ServerError, as everything here does."""
        return self._json("GET", path + (f"?{urlencode(query)}" if query else ""))

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        return self._json("POST", path, data, {"content-type": "application/json"} if data else {})

    def upload(self, path: Path, purpose: str, progress: Progress) -> dict[str, Any]:
        """Send a file as ``multipart/form-data``, block by block; ``progress`` hears how many bytes each block had."""
        boundary = f"chiron-{token_hex(16)}"
        name = path.name.replace("\\", "_").replace('"', "_").replace("\r", "_").replace("\n", "_")
        head = (
            f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
            f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
            "content-type: application/jsonl\r\n\r\n"
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            headers = {
                "content-type": f"multipart/form-data; boundary={boundary}",
                "content-length": str(len(head) + size + len(tail)),
            }
            body = _multipart(head, file, size, tail, progress)
            return self._json("POST", "/v1/files", body, headers, timeout_s=COMMIT_TIMEOUT_S)

    def download(self, file_id: str, target: BinaryIO, progress: Progress) -> int:
        """Copy a file's content into ``target``; returns its bytes."""
        with self._answer("GET", f"/v1/files/{quote(file_id, safe='')}/content") as answer:
            total = 0
            while block := answer.read(BLOCK_BYTES):
                target.write(block)
                total += len(block)
                progress(len(block))
            if answer.length:
                # A short read is no error to http.client when it is read in blocks.
                raise ServerError(f"{self.url}: the connection was lost after {total:,} bytes; try again")
            return total

    def _json(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> dict[str, Any]:
        with self._answer(method, path, body, headers or {}, timeout_s) as answer:
            text = answer.read(ANSWER_MAX_BYTES)
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}{path}: the answer is not a JSON object; is this an OpenAI server?")
        return found

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Iterator[http.client.HTTPResponse]:
        connection: http.client.HTTPConnection
        answer: http.client.HTTPResponse | None = None
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout_s)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout_s, context=self._tls)
        try:
            answer = self._send(connection, method, path, body, dict(headers or {}))
            if answer.status >= 400:
                raise ServerError(_refusal(self.url, path, answer), answer.status)
            yield answer
        except TimeoutError:
            raise ServerError(f"{self.url}: no answer within {timeout_s:g} s") from None
        except (http.client.HTTPException, ConnectionError, ssl.SSLError) as error:
            if isinstance(error, BrokenPipeError) and answer is not None:
                # Reading breaks no pipe: it is that of whoever was given what has been read.
                raise
            raise ServerError(f"{self.url}: the connection was lost: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | Iterator[bytes],
        headers: dict[str, str],
    ) -> http.client.HTTPResponse:
        try:
            connection.connect()
        except ssl.SSLError as error:
            raise ServerError(f"{self.url}: cannot connect: {reason_of(error)}{trust_hint(error)}") from None
        except OSError as error:
            raise ServerError(
                f"{self.url}: cannot connect: {error.strerror or error}; is `chiron serve` running there? (--url)"
            ) from None
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, path, body=body or None, headers=headers)
        except (BrokenPipeError, ConnectionResetError):
            # A server that refuses an upload answers before it has read everything, and closes.
            if isinstance(body, bytes):
                raise
        return connection.getresponse()


def _multipart(head: bytes, file: BinaryIO, size: int, tail: bytes, progress: Progress) -> Iterator[bytes]:
    """The parts in blocks. Exactly ``size`` bytes of the file, whatever happens to it meanwhile."""
    yield head
    left = size
    while left:
        block = file.read(min(BLOCK_BYTES, left))
        if not block:
            raise ServerError(f"the file became shorter while it was sent; {left:,} of its {size:,} bytes are missing")
        left -= len(block)
        yield block
        progress(len(block))
    yield tail


def _refusal(url: str, path: str, answer: http.client.HTTPResponse) -> str:
    """What the server said, in one line."""
    text = answer.read(ANSWER_MAX_BYTES)
    try:
        error = json.loads(text)["error"]
        said = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        said = text[:200].decode(errors="replace").strip() or answer.reason
    hint = " (--key, or the variable CHIRON_API_KEY)" if answer.status == 401 else ""
    return f"{url}{path.partition('?')[0]}: {answer.status}: {said}{hint}"
