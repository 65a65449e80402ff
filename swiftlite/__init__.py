"""swiftlite: fine-tune a language model and serve it, from one small framework.

`from swiftlite import LLM, SamplingParams` runs a model offline. The names load on first use, so that `import swiftlite`
(and with it the command line) never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from swiftlite.engine.request import SamplingParams
    from swiftlite.offline import LLM


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from swiftlite.offline import LLM

        return LLM
    if name == "SamplingParams":
        from swiftlite.engine.request import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'swiftlite' has no attribute {name!r}")
