"""Adapters over HTTP: `GET /v1/adapters`, and vLLM's `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`.

Loading is only there where the operator allowed it, behind the admin key if there is one, and only for directories that really lie
inside one root, links followed. Answers never show a path of the server: messages speak of the path as the client wrote it.
Reading happens in a thread; neither the event loop nor the step loop waits for a disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from swiftlite.errors import AdapterError, RequestError
from swiftlite.server.errors import APIError
from swiftlite.server.gate import Key, read_json
from swiftlite.server.protocol import parse
from swiftlite.server.service import Service

INVALID = "InvalidUserInput"  # vLLM's name


class LoadRequest(BaseModel):
    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    lora_name: str = ""
    lora_int_id: int | None = None


@dataclass(frozen=True)
class RuntimeAdapters:
    """Who may load what while the server runs."""

    root: Path  # real path
    admin_key: str | None = None

    def resolve(self, written: str) -> Path:
        """The directory that a client means. APIError when it, or a file in it, lies outside of the root."""
        refused = APIError(f"lora_path `{written[:200]}` is not inside the server's adapter root", 403, "lora_path", "Forbidden")
        try:
            path = Path(os.path.realpath(self.root / written))
            entries = [Path(os.path.realpath(entry.path)) for entry in os.scandir(path) if entry.is_symlink()] if path.is_dir() else []
        except (OSError, ValueError):  # a NUL, a loop of links, a name that is too long
            raise refused from None
        if not path.is_relative_to(self.root) or path == self.root or not all(entry.is_relative_to(self.root) for entry in entries):
            raise refused
        if not path.is_dir():
            raise APIError(f"there is no adapter at lora_path `{written[:200]}`", 404, "lora_path")
        return path


def add_routes(app: FastAPI, service: Service, runtime: RuntimeAdapters | None) -> None:
    """The list for everybody; loading only with `runtime`."""

    @app.get("/v1/adapters")
    async def adapters() -> JSONResponse:
        return JSONResponse(listing(service))

    if runtime is None:
        return
    key = None if runtime.admin_key is None else Key(runtime.admin_key)

    def admit(http: Request) -> None:
        if key is not None and not key.matches(http.headers.get("authorization", "")):
            raise APIError("wrong or missing admin key: send it as `Authorization: Bearer <key>`", 401)

    @app.post("/v1/load_lora_adapter")
    async def load(http: Request) -> Response:
        admit(http)
        request = parse(LoadRequest, await read_json(http))
        if not request.lora_name or not request.lora_path:
            raise APIError("Both 'lora_name' and 'lora_path' must be provided.", kind=INVALID)
        await service.change(_load, service, runtime, request)
        return Response(f"Success: LoRA adapter '{request.lora_name}' added successfully.", media_type="text/plain")

    @app.post("/v1/unload_lora_adapter")
    async def unload(http: Request) -> Response:
        admit(http)
        name = parse(UnloadRequest, await read_json(http)).lora_name
        if not name:
            raise APIError("'lora_name' needs to be provided to unload a LoRA adapter.", kind=INVALID)
        await service.change(_unload, service, name)
        return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")


def _load(service: Service, runtime: RuntimeAdapters, request: LoadRequest) -> None:
    name = request.lora_name
    if service.is_base(name):
        raise APIError(f"The lora adapter '{name[:100]}' conflicts with a served base model.", kind=INVALID)
    if name in service.adapters and not request.load_inplace:
        text = "has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
        raise APIError(f"The lora adapter '{name[:100]}' {text}", kind=INVALID)
    path = runtime.resolve(request.lora_path)
    try:
        service.add_adapter(name, path)
    except AdapterError as error:
        text = ". ".join(part.rstrip(".") for part in (error.what, error.why, error.fix) if part)
        raise APIError(text.replace(str(path), request.lora_path).replace(str(runtime.root), ""), 400, "lora_path") from None
    except RequestError as error:
        raise APIError(f"{error.what}: {error.fix}", 400, "lora_name", INVALID) from None


def _unload(service: Service, name: str) -> None:
    if name not in service.adapters:
        raise APIError(f"The lora adapter '{name[:100]}' cannot be found.", 404, "lora_name")
    service.remove_adapter(name)


def listing(service: Service) -> dict[str, Any]:
    """Every adapter's state, without paths."""
    rows = [
        {
            "id": info.name,
            "object": "adapter",
            "state": info.state,
            "version": info.version,
            "digest": info.digest,
            "rank": info.rank,
            "bytes": info.nbytes,
            "tier": info.tier,
            "requests": info.requests,
            "served": info.served,
        }
        for info in service.engine.adapters()
    ]
    return {"object": "list", "data": rows}
