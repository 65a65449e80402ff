"""The HTTP application over one Service: routes, errors, gate. It knows no flags and starts nothing."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swiftlite.server import adapters, chat, completions, generate, models
from swiftlite.server.errors import APIError, answer, from_swift_error, install
from swiftlite.server.gate import Gate, read_json
from swiftlite.server.protocol import ChatRequest, CompletionRequest, parse
from swiftlite.server.service import Service, UnknownModel
from swiftlite.server.tokens import Tokens


def create_app(service: Service, api_key: str | None = None, runtime: adapters.RuntimeAdapters | None = None) -> FastAPI:
    """The OpenAI routes and `/health` for `service`; with `api_key`, `/v1` and `/v2` ask for it. `runtime` allows loading adapters."""
    # No schema and no docs pages: they load scripts from elsewhere, and the routes read their own bodies.
    app = FastAPI(title="swiftlite", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, api_key=api_key, admin_key=runtime.admin_key if runtime else None)
    install(app)
    tokens = Tokens(service.engine.tokenizer)

    @app.exception_handler(UnknownModel)
    async def unknown_model(_: Request, error: UnknownModel) -> JSONResponse:
        refused = from_swift_error(error)
        refused.status = 404
        return answer(refused)

    def ready() -> None:
        if not service.healthy:
            raise APIError("the engine has stopped; restart the server", 503)

    @app.get("/health")
    @app.get("/ping")
    async def health() -> JSONResponse:
        ready()
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        return JSONResponse(models.listing(service))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> JSONResponse:
        return JSONResponse(models.card(service, service.served(name)))

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        request = parse(ChatRequest, await read_json(http))
        ready()
        return await chat.create(service, tokens, request, http)

    @app.post("/v1/completions")
    async def text_completions(http: Request) -> Response:
        request = parse(CompletionRequest, await read_json(http))
        ready()
        return await completions.create(service, tokens, request, http)

    generate.add_routes(app, service)
    adapters.add_routes(app, service, runtime)
    return app
