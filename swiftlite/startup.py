"""A quick start: torch and transformers imported without garbage collections, the model's files read from the disk meanwhile.

Importing the two is most of a start, and a quarter of that was collecting garbage: 700,000 objects are made that all stay, and each
collection walks what there is to find nothing. Reading files needs nothing of Python, so it begins first.

Does not know models or commands. Importing this module imports nothing heavy.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

from swiftlite.later import compiler_later, no_distributed_tensors

T = TypeVar("T")

WEIGHTS = "*.safetensors"


def begin(model_dir: Path | None = None, *, alone: bool = False, meanwhile: Callable[[], T] | None = None) -> T | None:
    """Import torch and transformers' model code, unless that is done; the weights in `model_dir` are on their way from then on.

    `alone`: the process is ours and runs a model by itself, so that nothing of transformers will need to be distributed in it.
    `meanwhile` is called as soon as torch is there and may begin what needs no Python; its result is returned.
    """
    if model_dir is not None:
        threading.Thread(target=_read_ahead, args=(model_dir,), name="swiftlite-read-ahead", daemon=True).start()
    if "torch" in sys.modules:
        return None if meanwhile is None else meanwhile()
    # what is to be renamed concerns those who write code, not those who run it; and the one may call the other by its old names
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b")
    collecting = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401

        begun = None if meanwhile is None else meanwhile()
        _import_models()
        with compiler_later(), no_distributed_tensors() if alone else nullcontext():
            # what models' files import first, so that its marks for the compiler are noted as well
            import transformers.masking_utils
            import transformers.modeling_layers
            import transformers.modeling_utils  # noqa: F401
    finally:
        if collecting:
            gc.freeze()  # what was imported stays: no later collection needs to walk it
            atexit.register(gc.unfreeze)  # but for the last one: extension modules complain about what is left at the exit
            gc.enable()
    return begun


def _import_models() -> None:
    """Import `transformers.models` without reading its 2,000 files a second time.

    transformers 5 reads them to know the names it has: once for itself, keyed by a Path, and once for that package, keyed by a
    string, so that its own cache misses. While the package is imported the function that would read gives what the first read
    found. Where anything of this is named otherwise, the package reads for itself.
    """
    import transformers
    from transformers.utils import import_utils

    try:
        read = import_utils.define_import_structure
        folder = Path(transformers.__file__).parent / "models"
        found = read(folder)  # known by now
    except (AttributeError, OSError, TypeError):
        return

    def once(path: str, prefix: str | None = None) -> Any:
        return found if Path(path).parent == folder else read(path, prefix)

    import_utils.define_import_structure = once  # type: ignore[assignment]
    try:
        import transformers.models
    finally:
        import_utils.define_import_structure = read


def _read_ahead(directory: Path) -> None:
    """Have the weights read into the page cache, where they fit in half of the memory. Where they are already it takes no time."""
    try:
        files = list(directory.glob(WEIGHTS))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if sum(file.stat().st_size for file in files) > memory // 2:
            return
        for file in files:
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    except (OSError, ValueError, AttributeError):  # gone, or no such call on this system: who needs them reads them
        return
