"""Checkpoints to a model hub: ModelScope, or Hugging Face with --use_hf. The hubs' own clients do the work.

Everything that can be wrong is found before training: the client, the token, the repository's name, the right to write. Later
only the network can fail, and then training goes on: what is on disk is whole. Pushed is what a user loads: weights, tokenizer,
template, settings; not the optimizer's state.
"""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from swiftlite.errors import HubError, UsageError
from swiftlite.options.parse import Options
from swiftlite.train.checkpoint import STATE, TENSORS

KEPT_HERE = (STATE, TENSORS)


class Client(Protocol):
    """What we need of a hub."""

    def login(self) -> str:
        """The account's name. Any exception: the token is not good."""

    def create(self, repo: str, private: bool) -> None: ...
    def upload(self, repo: str, folder: str, message: str) -> None: ...


class _HuggingFace:
    name, extra, variable, page = "Hugging Face", "huggingface_hub", "HF_TOKEN", "hf auth login"

    def __init__(self, token: str | None) -> None:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they would write over ours

        self.token = token or get_token()
        self.api = HfApi(token=self.token)

    def login(self) -> str:
        return self.api.whoami()["name"]

    def create(self, repo: str, private: bool) -> None:
        self.api.create_repo(repo, private=private, exist_ok=True)

    def upload(self, repo: str, folder: str, message: str) -> None:
        self.api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)


class _ModelScope:
    name, extra, variable, page = "ModelScope", "modelscope", "MODELSCOPE_API_TOKEN", "modelscope login"

    def __init__(self, token: str | None) -> None:
        from modelscope.hub.api import HubApi, ModelScopeConfig

        for logger in ("modelscope", "modelscope_hub"):  # what failed is in our error
            logging.getLogger(logger).setLevel(logging.ERROR)
        self.api = HubApi()
        # a saved login has the account's name; the key itself stays with the client
        self.saved = ModelScopeConfig.get_user_info()[0]
        self.key = token or os.environ.get("MODELSCOPE_API_TOKEN")
        self.token = self.key or self.saved

    def login(self) -> str:
        if self.key:
            self.api.login(self.key)
            self.saved = type(self)._user() or self.saved
        return str(self.saved)

    @staticmethod
    def _user() -> str | None:
        from modelscope.hub.api import ModelScopeConfig

        return ModelScopeConfig.get_user_info()[0]

    def create(self, repo: str, private: bool) -> None:
        self.api.create_repo(repo, repo_type="model", visibility="private" if private else "public", exist_ok=True, token=self.key)

    def upload(self, repo: str, folder: str, message: str) -> None:
        self.api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, token=self.key)


@dataclass
class Push:
    """A repository that is ready to be written to."""

    client: Client
    hub: str
    repo: str
    last: str | None = None  # the checkpoint that is there
    failed: str = ""

    @staticmethod
    def ready(options: Options, name: str) -> Push | None:
        """For the run's flags; None without --push_to_hub. `name`: the repository's where --hub_model_id gives none.

        UsageError or HubError when it could not be written to.
        """
        if not options.push_to_hub:
            if options.hub_model_id:
                raise UsageError("--hub_model_id is where --push_to_hub writes", fix="add --push_to_hub true, or leave it out")
            return None
        kind: Any = _HuggingFace if options.use_hf or os.environ.get("USE_HF", "").lower() in ("1", "true") else _ModelScope
        try:
            client = kind(options.hub_token)
        except ImportError as error:
            raise HubError(f"--push_to_hub needs the package {kind.extra}", str(error), f"pip install {kind.extra}") from None
        if not client.token:
            raise HubError(
                f"--push_to_hub: there is no token for {kind.name}", f"neither --hub_token nor {kind.variable} is set, nor a login saved",
                f"set {kind.variable}, or run `{kind.page}`" + ("" if options.use_hf else "; --use_hf true pushes to Hugging Face"),
            )  # fmt: skip
        try:
            owner = client.login()
            given = options.hub_model_id or name
            repo = given if "/" in given else f"{owner}/{given}"
            client.create(repo, options.hub_private_repo)
        except Exception as error:  # each client has its own tree of network and permission errors
            raise HubError(
                f"--push_to_hub: {kind.name} refuses", _first_line(error), "check the token's rights and --hub_model_id, then start again"
            ) from None
        print(f"checkpoints are pushed to {kind.name}: {repo}{' (private)' if options.hub_private_repo else ''}")
        return Push(client, kind.name, repo)

    def send(self, checkpoint: Path) -> None:
        """Push one checkpoint; a failure is said and remembered, and training goes on."""
        with tempfile.TemporaryDirectory(prefix="swiftlite-push-") as folder:
            for file in checkpoint.rglob("*"):
                if file.is_file() and file.name not in KEPT_HERE:
                    place = Path(folder, file.relative_to(checkpoint))
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.symlink_to(file.resolve())  # the clients read through links, and leave their own files there, not here
            try:
                self.client.upload(self.repo, folder, checkpoint.name)
            except Exception as error:
                self.failed = _first_line(error)
                print(f"note: pushing {checkpoint.name} to {self.repo} failed: {self.failed}", flush=True)
                return
        self.last, self.failed = str(checkpoint), ""
        print(f"pushed {checkpoint.name} to {self.hub}: {self.repo}", flush=True)

    def finish(self, checkpoint: str | None) -> None:
        """The run's result, the best checkpoint or the last, is what the repository holds in the end. HubError when it is not."""
        if checkpoint is None:
            return
        if self.last != checkpoint or self.failed:
            self.send(Path(checkpoint))
        if self.failed:
            how = f"hf upload {self.repo} {checkpoint}" if self.hub == "Hugging Face" else f"modelscope upload {self.repo} {checkpoint}"
            raise HubError(f"the result could not be pushed to {self.repo}", self.failed, f"it is whole in {checkpoint}: {how}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
