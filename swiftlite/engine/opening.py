"""An engine of a model directory, started the quick way: torch, transformers and the weights come together (startup.py, ahead.py).

Importing this module imports nothing heavy.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from swiftlite import startup
from swiftlite.engine.config import EngineConfig

if TYPE_CHECKING:
    import torch

    from swiftlite.engine.ahead import Ahead
    from swiftlite.engine.engine import Engine


def open_engine(
    model_dir: Path,
    config: EngineConfig,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    adapters: dict[str, str] | None = None,
    alone: bool = False,
) -> Engine:
    """Raises what Engine does. `alone`: the process is ours and runs nothing else (`startup.begin`)."""

    def pack() -> Ahead | None:
        from swiftlite.engine.ahead import pack_ahead

        return pack_ahead(model_dir, str(dtype).removeprefix("torch."), device, config.quantization)

    ahead = startup.begin(model_dir, alone=alone, meanwhile=pack)
    from swiftlite.engine.engine import Engine

    with ahead or nullcontext():
        return Engine(model_dir, config, dtype=dtype, device=device, adapters=adapters, ahead=ahead)
