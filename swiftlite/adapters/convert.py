"""A checkpoint's adapter -> a plain PEFT directory, always: also when it is in PEFT's format already.

SWIFT 1.x and 2.x saved adapters in a layout of their own: a folder per adapter (`default/`), keys without PEFT's prefix and
with the adapter's name inside, and settings that PEFT does not know. Only what serving needs is carried along: no optimizer,
no trainer state, no logs. The result is read back before it appears.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from swiftlite.adapters.config import MERGE
from swiftlite.adapters.directory import read
from swiftlite.adapters.files import CONFIG, PICKLE, WEIGHTS
from swiftlite.errors import AdapterError
from swiftlite.models.shards import CARRIED_FILES, copy_files, new_directory

CARRIED = (*CARRIED_FILES, "README.md", "sft_args.json", "args.json", "additional_config.json")
# Settings of SWIFT's own LoRA that PEFT's configuration does not have.
SWIFT_SETTINGS = (
    "swift_type", "use_qa_lora", "use_merged_linear", "enable_lora", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "model_key_mapping",
)  # fmt: skip
PREFIX = "base_model.model."
NAMED = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.[^.]+(\.weight|\.bias)?$")


def to_peft(ckpt_dir: str | Path, out_dir: str | Path, *, exist_ok: bool = False) -> Path:
    """Write the adapter of `ckpt_dir` to `out_dir` in PEFT's format (safetensors). AdapterError when there is none that fits."""
    ckpt = Path(ckpt_dir)
    source = find(ckpt)
    raw = _config(source)
    tensors = _weights(source)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    with new_directory(out_dir, exist_ok=exist_ok, needs=size + (64 << 20), sources=(ckpt,)) as work:
        from safetensors.torch import save_file

        (work / CONFIG).write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, work / WEIGHTS, metadata={"format": "pt"})
        for folder in dict.fromkeys((ckpt, source)):
            copy_files(folder, work, CARRIED)
        read(work)
    return Path(out_dir)


def find(ckpt: Path) -> Path:
    """The folder that holds the adapter: the checkpoint itself, or its `default/` in SWIFT's layout."""
    if not ckpt.is_dir():
        raise AdapterError(f"no checkpoint at {ckpt}", "there is no such directory", "check the path")
    if (ckpt / CONFIG).is_file():
        return ckpt
    folders = sorted(path.parent for path in ckpt.glob(f"*/{CONFIG}"))
    if not folders:
        why = "it is a full model" if (ckpt / "config.json").is_file() else f"it has no {CONFIG}"
        raise AdapterError(f"{ckpt} holds no adapter", why, "pass the checkpoint folder of a LoRA run")
    if (ckpt / "extra_states").is_dir():
        raise AdapterError(f"{ckpt} has extra_states", "other trained weights lie beside the adapter and would be lost", MERGE)
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise AdapterError(f"{ckpt} holds several adapters: {names}", fix=f"pass one of them: --ckpt_dir {folders[0]}")
    return folders[0]


def _config(source: Path) -> dict[str, Any]:
    try:
        raw = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        kind = raw.get("peft_type") or raw.get("swift_type")
    except (ValueError, OSError, AttributeError) as error:
        raise AdapterError(f"{source / CONFIG} cannot be read", str(error), "copy the checkpoint again") from None
    if kind != "LORA":
        raise AdapterError(f"{source} is not a LoRA adapter", f"its type is {kind!r}", MERGE)
    for name in ("use_qa_lora", "use_merged_linear"):
        if raw.get(name):
            raise AdapterError(f"{source} uses SWIFT's {name}", "PEFT has no such adapter", "merge it with the SWIFT that made it")
    return {**{key: value for key, value in raw.items() if key not in SWIFT_SETTINGS}, "peft_type": "LORA", "inference_mode": True}


def _weights(source: Path) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's keys."""
    found = _load(source)
    converted: dict[str, Tensor] = {}
    for key, tensor in found.items():
        name = key.removeprefix(PREFIX)
        if key == name:  # PEFT always writes its prefix, and then no adapter name
            name = NAMED.sub(r".\1\2", name)
        name = PREFIX + name
        if name in converted:
            raise AdapterError(f"{source} holds several adapters in one file", f"{key} and another key are both {name}", "split them first")
        converted[name] = tensor
    return converted


def _load(source: Path) -> dict[str, Tensor]:
    if (source / WEIGHTS).is_file():
        import safetensors.torch
        from safetensors import SafetensorError

        try:
            return safetensors.torch.load_file(source / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{source / WEIGHTS} cannot be read", str(error), "copy the checkpoint again") from None
    if (source / PICKLE).is_file():
        import pickle

        import torch

        try:  # weights_only: tensors and nothing that runs
            return torch.load(source / PICKLE, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise AdapterError(
                f"{source / PICKLE} cannot be read safely", str(error).splitlines()[0], "copy the checkpoint again"
            ) from None
    raise AdapterError(f"the adapter in {source} is incomplete", f"{WEIGHTS} is missing", "take another checkpoint")
