"""A model's or dataset's name -> a local directory.

Order: the bundled `tiny-chat`, a path, SWIFT's model_type (`models.catalog`), then a hub id: both local caches first, then
ModelScope, then Hugging Face (`--use_hf` or USE_HF=1 turns the two round). The hubs' own clients do the work, so their
environment variables (MODELSCOPE_CACHE, HF_HOME, HF_HUB_OFFLINE, tokens) hold. It knows nothing of what a directory contains.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from swiftlite.errors import HubError
from swiftlite.models.catalog import MODELS

TINY_CHAT = Path(__file__).parent / "models" / "tiny_chat"
ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str, revision: str | None = None, use_hf: bool = False) -> Path:
    """Directory of a model given by path, `tiny-chat`, model_type or hub id. Raises HubError that says what was tried."""
    if name == "tiny-chat" and not Path(name).exists():
        return TINY_CHAT
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise HubError(f"{name} is a file, not a model directory", fix="pass the directory that holds config.json")
    ids = MODELS.get(name) or ((name, name) if ID.fullmatch(name) else None)
    if ids is None:
        close = get_close_matches(name, [*MODELS, "tiny-chat"], n=1)
        raise HubError(
            f"unknown model {name!r}",
            "it is no directory, no hub id (org/name) and no model_type",
            f"did you mean {close[0]!r}?" if close else "pass a directory, a hub id, or try the bundled 'tiny-chat'",
        )
    return _fetch("model", name, ids, revision, use_hf)


def resolve_dataset(name: str, revision: str | None = None, use_hf: bool = False, hf_name: str = "") -> Path:
    """Directory of a dataset given by hub id; the same rules. `hf_name`: its id on Hugging Face where that differs."""
    if not ID.fullmatch(name):
        raise HubError(f"no such dataset: {name}", "it is no file, no folder and no hub id (org/name)", "check the path")
    return _fetch("dataset", name, (name, hf_name or name), revision, use_hf)


def _fetch(kind: str, name: str, ids: tuple[str, str], revision: str | None, use_hf: bool) -> Path:
    hubs: list[tuple[str, str, Callable[..., str]]] = [("ModelScope", ids[0], _modelscope), ("Hugging Face", ids[1], _hugging_face)]
    if use_hf or os.environ.get("USE_HF", "").lower() in ("1", "true"):
        hubs.reverse()
    tried = []
    for local in (True, False):
        for hub, id, fetch in hubs:
            try:
                if not local:
                    print(f"asking {hub} for {id} ...", flush=True)
                return Path(fetch(kind, id, revision, local))
            except Exception as error:  # each client has its own tree of network and cache errors
                tried.append(f"{hub}'s {'cache' if local else 'server'}: {str(error).splitlines()[0][:160]}")
    raise HubError(
        f"cannot get {kind} {name}",
        "; ".join(tried),
        f"download it elsewhere and pass the directory, or fill a cache ({', '.join(ids[:1])})",
    )


def _modelscope(kind: str, id: str, revision: str | None, local: bool) -> str:
    import logging

    from modelscope import snapshot_download

    for logger in ("modelscope", "modelscope_hub"):  # retries and cache notes; what failed is in our error
        logging.getLogger(logger).setLevel(logging.ERROR)
    return snapshot_download(id, repo_type=kind, revision=revision, local_files_only=local)


def _hugging_face(kind: str, id: str, revision: str | None, local: bool) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(id, repo_type=kind, revision=revision, local_files_only=local)
