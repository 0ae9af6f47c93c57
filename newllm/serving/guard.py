"""What a request must satisfy before it is looked at: a key, and a body of a bounded size."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING

from starlette.responses import JSONResponse

from newllm.serving.protocol import failure

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What anyone may see: the page holds no secrets, and health is asked by machines without a key.
_OPEN = ("/", "/health")


class _Stop(Exception):
    """A request that is refused."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.answer = JSONResponse(failure(message, kind), status)


class Guard:
    """Refuses requests without the key (401), long bodies (413) and slow ones (408).

    Args:
        app: what is guarded.
        key: the API key (None: anyone may ask).
        most: bytes of a body at most.
        seconds: in which it must have arrived.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            if not self._knows(scope["path"], headers):
                raise _Stop(401, "authentication_error", "a valid API key is needed")
            body = await asyncio.wait_for(self._body(headers, receive), self._seconds)
        except TimeoutError:
            late = f"the body must arrive within {self._seconds:g} seconds"
            await _Stop(408, "invalid_request_error", late).answer(scope, receive, send)
        except _Stop as stop:
            await stop.answer(scope, receive, send)
        else:
            await self._app(scope, _replayed(body, receive), send)

    def _knows(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._expected is None or path in _OPEN:
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), self._expected)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """The whole body, refused as soon as it is too long."""
        too_long = _Stop(413, "invalid_request_error", f"the body must have at most {self._most} bytes")
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._most:
            raise too_long
        parts, length, more = [], 0, True
        while more:
            message = await receive()
            part = message.get("body", b"")
            parts.append(part)
            length += len(part)
            more = message.get("more_body", False)
            if length > self._most:
                raise too_long
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives ``body`` first and then what really comes: the client's leaving."""
    held = [body]

    async def replay() -> Message:
        if held:
            return {"type": "http.request", "body": held.pop(), "more_body": False}
        return await receive()

    return replay
