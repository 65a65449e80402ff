"""`GET /v1/models` and `/v1/models/{id}`: the base first, then its adapters. No paths: `root` is the base's name."""

from __future__ import annotations

from typing import Any

from swiftlite.server.service import Served, Service


def card(service: Service, served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": service.created,
        "owned_by": service.owned_by,
        "root": service.name,
        "parent": service.name if served.adapter else None,
        "max_model_len": service.limits.max_model_len,
        "is_chat": served.template.has_chat,
    }


def listing(service: Service) -> dict[str, Any]:
    return {"object": "list", "data": [card(service, one) for one in (service.base, *service.adapters.values())]}
