"""Errors that a user can cause, each said as what happened, why, and how to fix it.

`cli.main` prints a SwiftError without a traceback and exits with its `exit_code`; the server turns it into an OpenAI error
object. Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class SwiftError(Exception):
    """What happened (`what`), why (`why`) and the way out (`fix`), in plain words."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(part for part in (what, why and f"  why: {why}", fix and f"  fix: {fix}") if part))


class UsageError(SwiftError):
    """The command line itself is wrong (exit code 2)."""

    exit_code = 2


class HubError(SwiftError):
    """A model or dataset could not be found."""


class ModelError(SwiftError):
    """A model directory is broken, or holds a model that the engine cannot run."""


class DataError(SwiftError):
    """A dataset cannot be read, or nothing of it is left after encoding."""


class TemplateError(SwiftError):
    """A chat template is missing or cannot give labels."""


class AdapterError(SwiftError):
    """An adapter directory is broken or belongs to another base model."""


class CheckpointError(SwiftError):
    """A training checkpoint is incomplete or does not fit the run."""


class TrainError(SwiftError):
    """Training cannot go on: the loss is no number, or nothing learns."""


class OverloadError(SwiftError):
    """Too many requests wait (HTTP 503)."""


class RequestError(SwiftError):
    """One request is invalid (HTTP 400); `param` names the field, as OpenAI's error objects do."""

    def __init__(self, what: str, why: str = "", fix: str = "", param: str | None = None) -> None:
        super().__init__(what, why, fix)
        self.param = param
