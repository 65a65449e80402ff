"""What a client is told when a request fails: one JSON shape, `{"error": {"message", "type", "param", "code"}}`, as vLLM's.

Messages never carry a server path or a traceback; those go to the server's log, found again by the request's id.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from swiftlite.errors import AdapterError, OverloadError, RequestError, SwiftError, TemplateError

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("swiftlite.server")

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class APIError(Exception):
    """A request that is answered with `status`; `param` names the field at fault."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.kind = message, status, param, kind

    def body(self) -> dict[str, Any]:
        kind = self.kind or TYPES.get(self.status) or HTTPStatus(self.status).phrase
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


def from_swift_error(error: SwiftError, request_id: str = "") -> APIError:
    """Refusals of the engine and the template. What may name a path of ours (a model, an adapter) is not passed on."""
    if isinstance(error, RequestError | OverloadError | TemplateError):
        message = ". ".join(part.rstrip(".") for part in (error.what, error.why, error.fix) if part)
        return APIError(message, 503 if isinstance(error, OverloadError) else 400, error.param if isinstance(error, RequestError) else None)
    if isinstance(error, AdapterError):  # it was taken out between the look-up and the request
        return APIError("this adapter is not served any more", 404, "model")
    return internal(error, request_id)


def answer(error: APIError) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status == 503 else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


def install(app: FastAPI) -> None:
    """Every refusal of a route becomes the one JSON shape; what is a bug of ours goes up to the gate."""

    @app.exception_handler(APIError)
    async def refused(_: Request, error: APIError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(SwiftError)
    async def invalid(request: Request, error: SwiftError) -> JSONResponse:
        return answer(from_swift_error(error, request.scope.get("request_id", "")))

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = (
                f"there is no {request.method} {request.url.path[:200]}; see /v1/models, /v1/chat/completions, /v1/completions, /health"
            )
        response = answer(APIError(message, error.status_code))
        response.headers.update(error.headers or {})
        return response


def internal(error: BaseException, request_id: str) -> APIError:
    """A bug of ours: the traceback goes to the log, its id to the client."""
    log.error("request %s failed", request_id, exc_info=error)
    return APIError(f"internal error; the server's log has it under request {request_id}", 500)


def as_api_error(error: Exception, request_id: str) -> APIError:
    """Any exception as what the client is told."""
    if isinstance(error, APIError):
        return error
    return from_swift_error(error, request_id) if isinstance(error, SwiftError) else internal(error, request_id)
