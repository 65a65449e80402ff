"""Round-to-nearest weight-only quantization: int8 with a scale per output channel, int4 with a scale per group of inputs.

No calibration data. Linears of the layers are quantized; embeddings, the output head and whatever is no `nn.Linear` stay. The
result is a compressed-tensors checkpoint (`packed`), written shard by shard without building the model. This first version
is about storage: transformers and our engine unpack the weights into the compute dtype when they load it; vLLM computes on
the packed weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftlite.errors import ModelError, SwiftError
from swiftlite.models.loading import load_config
from swiftlite.models.shards import CARRIED_FILES, Shards, copy_files, new_directory, open_shards, read_config, rewrite
from swiftlite.options.resolve import ARGS_FILES
from swiftlite.quantize import packed
from swiftlite.quantize.rounding import round_to_nearest

VLLM_GROUPS = (32, 64, 128)
EXPERT = re.compile(r"\.experts\.\d+\.\w+$")


def choose_group_size(widths: set[int], wanted: int, given: bool, log: Callable[[str], None]) -> int:
    """The wanted group size where it divides every layer's width, else the largest power of two that does.

    SwiftError when the user asked for one that does not fit, or none of at least 8 does.
    """
    if wanted > 0 and all(width % wanted == 0 for width in widths):
        return wanted
    fitting = [size for size in (128, 64, 32, 16, 8) if all(width % size == 0 for width in widths)]
    bad = min(width for width in widths if wanted <= 0 or width % wanted)
    if given or not fitting:
        raise SwiftError(
            f"group size {wanted} does not fit this model",
            f"it has a layer with {bad} inputs, which {wanted} does not divide",
            f"pass --group_size {fitting[0]}" if fitting else "pass --quant_bits 8, which needs no groups",
        )
    log(f"group size {fitting[0]}: {wanted} does not divide the model's {bad} inputs")
    return fitting[0]


def linears(model_dir: str | Path, shards: Shards) -> tuple[list[str], list[str]]:
    """(names of the linears to quantize, names of those that stay), both as the checkpoint has them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(model_dir))
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    found: list[str] = []
    kept: list[str] = []
    for name in shards.module_shapes():
        module = modules.get(name)
        if isinstance(module, torch.nn.Embedding):
            continue
        # Experts are one tensor a layer in the model and linears in the checkpoint; a router, neither linear nor expert, stays.
        quantized = (isinstance(module, torch.nn.Linear) and module is not head) or (module is None and EXPERT.search(name))
        (found if quantized else kept).append(name)
    kept += [name for name, module in modules.items() if module is head and name not in kept]  # a tied head has no tensor
    if not found:
        raise ModelError(f"nothing to quantize in {model_dir}", "none of its weights is a plain linear layer", "use it as it is")
    return found, kept


def quantize(
    model_dir: str | Path,
    out_dir: str | Path,
    bits: int,
    group_size: int = 128,
    *,
    group_size_given: bool = False,
    exist_ok: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Write `model_dir` with its linears in `bits` (8 or 4) to `out_dir`. ModelError / SwiftError before anything is written."""
    config = read_config(model_dir)
    if config.get("quantization_config"):
        raise ModelError(f"{model_dir} is quantized already", "quantizing twice only loses more", "pass the 16-bit model")
    shards = open_shards(model_dir)
    names, kept = linears(model_dir, shards)
    group = None
    if bits == 4:
        group = choose_group_size({shards.tensors[f"{name}.weight"].shape[1] for name in names}, group_size, group_size_given, log)
        if group not in VLLM_GROUPS:
            log(f"note: vLLM reads group sizes {', '.join(map(str, VLLM_GROUPS))} only; transformers and swiftlite read {group}")
    how = "one scale a row" if group is None else f"one scale per {group} weights"
    shown = ", ".join(kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
    log(f"quantizing {len(names)} linears of {model_dir} to int{bits} by rounding to nearest ({how}); kept: {shown or 'none'}")
    keys = {f"{name}.weight": name for name in names}
    loss: list[tuple[float, float]] = []

    def transform(key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if key not in keys:
            yield key, tensor
            return
        q, scale = round_to_nearest(tensor, bits, group)
        loss.append(((packed.dequantize(q, scale).float() - tensor.float()).square().sum().item(), tensor.float().square().sum().item()))
        yield from packed.tensors(keys[key], q, scale, bits)

    with new_directory(out_dir, exist_ok=exist_ok, needs=shards.nbytes * bits // 16 + (64 << 20), sources=(model_dir,)) as work:
        rewrite(shards, work, transform, log)
        _write_configs(Path(model_dir), work, {**config, "quantization_config": packed.config(bits, group, kept)})
        written = sum(path.stat().st_size for path in work.glob("*.safetensors"))
    error = (sum(e for e, _ in loss) / sum(s for _, s in loss)) ** 0.5
    log(f"weights: {shards.nbytes / 2**20:.1f} MiB -> {written / 2**20:.1f} MiB; relative error of the quantized ones {error:.2%}")
    log(f"quantized model: {out_dir}")
    return Path(out_dir)


def _write_configs(source: Path, out: Path, config: dict[str, Any]) -> None:
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copy_files(source, out, (*CARRIED_FILES, *ARGS_FILES))
