"""What every request passes before a route sees it: a request id, the API key, and a body that is JSON and not too large.

Plain ASGI, because a middleware that wraps responses costs a task and a queue per streamed chunk.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import uuid
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swiftlite.server.errors import APIError, answer, internal

MAX_BODY = 16 * 2**20  # bytes: a million token ids as JSON need 7 MB
BODY_PAUSE = 30.0  # seconds between two pieces of a body
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class Key:
    """A secret that clients send as a bearer token."""

    def __init__(self, secret: str) -> None:
        self._digest = hashlib.sha256(secret.encode()).digest()

    def matches(self, authorization: str) -> bool:
        """Whether an `Authorization` header carries it."""
        scheme, _, token = authorization.partition(" ")
        # Digests of equal length, compared in constant time: neither the key's length nor its beginning leaks.
        digest = hashlib.sha256(token.strip().encode("utf-8", "replace")).digest()
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == "bearer"


class Gate:
    """Gives each request an id (the client's `x-request-id` when it is a plain one) and checks the key on `/v1` and `/v2`.

    The admin key opens what the API key opens; what asks for the admin key itself, asks again.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, admin_key: str | None = None) -> None:
        self.app = app
        self.keys = [Key(key) for key in (api_key, admin_key) if key] if api_key else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"] = request_id

        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        if self.keys and scope["path"].startswith(("/v1", "/v2")) and not self._allowed(headers.get("authorization", "")):
            error = APIError("wrong or missing API key: send it as `Authorization: Bearer <key>`", 401)
            await answer(error)(scope, receive, send_with_id)
            return
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            await answer(internal(error, request_id))(scope, receive, send_with_id)

    def _allowed(self, authorization: str) -> bool:
        return sum(key.matches(authorization) for key in self.keys) > 0  # every key takes its time


def _no_constant(name: str) -> Any:
    raise APIError(f"the body is not valid JSON: {name} is not a JSON number")


async def read_json(request: Request, any_type: bool = False) -> dict[str, Any]:
    """The body as a JSON object. APIError 400 (not JSON), 408 (too slow) or 413 (too large).

    `any_type`: whatever its header says, unless a page of another site asks: a browser lets it send all but JSON without asking us.
    """
    origin = request.headers.get("origin")
    own = origin is None or origin.partition("://")[2] == request.headers.get("host")
    if not (any_type and own) and request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError("send the body as JSON, with the header `Content-Type: application/json`")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise APIError("compressed bodies are not accepted")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY:
        raise APIError(f"the body has {length} bytes, more than {MAX_BODY}", 413)
    body = bytearray()
    pieces = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(pieces, b""), BODY_PAUSE)
        except asyncio.TimeoutError:
            raise APIError(f"no more of the body came for {BODY_PAUSE:.0f} seconds", 408) from None
        except ClientDisconnect:
            raise APIError("the client went away", 400) from None
        body += piece
        if len(body) > MAX_BODY:
            raise APIError(f"the body has more than {MAX_BODY} bytes", 413)
        if not piece:
            break
    try:
        text = body.decode("utf-8")
        content = json.loads(text, parse_constant=_no_constant)
        if "\\ud" in text or "\\uD" in text:  # only an escape can bring half a surrogate pair, which no tokenizer takes
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise APIError("the body is not valid: its JSON is nested too deeply") from None
    except UnicodeError as error:
        raise APIError(
            f"the body is not valid Unicode: {error.reason if isinstance(error, UnicodeDecodeError) else 'a lone surrogate'}"
        ) from None
    except ValueError as error:  # also an integer of more than 4300 digits
        raise APIError(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise APIError("the body must be a JSON object")
    return content
