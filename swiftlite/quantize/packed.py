"""The `pack-quantized` tensors of compressed-tensors: symmetric integers, several to an int32, with their scales.

A weight [out, in] becomes `weight_packed` int32 [out, ceil(in * bits / 32)] (value plus 2^(bits-1), lowest bits first),
`weight_scale` [out, groups] in the weight's dtype and `weight_shape` int64 [2]. transformers and vLLM read these. It does not
know how the integers were chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FORMAT = "pack-quantized"


def pack(q: Tensor, bits: int) -> Tensor:
    """int8 [out, in] -> int32 [out, words]; bits is 4 or 8."""
    codes = (q.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes.contiguous().view(torch.int32)


def unpack(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """int32 [out, words] -> int8 [out, in]."""
    codes = packed.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    return (codes[:, : shape[1]].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """int8 [out, in] and scale [out, groups] -> the weight, in the scale's dtype."""
    grouped = q.unflatten(1, (scale.shape[1], -1)).to(torch.float32) * scale.to(torch.float32)[:, :, None]
    return grouped.flatten(1).to(scale.dtype)


def tensors(name: str, q: Tensor, scale: Tensor, bits: int) -> list[tuple[str, Tensor]]:
    """What stands in the checkpoint for `<name>.weight`."""
    return [
        (f"{name}.weight_packed", pack(q, bits)),
        (f"{name}.weight_scale", scale),
        (f"{name}.weight_shape", torch.tensor(q.shape, dtype=torch.int64)),
    ]


def config(bits: int, group_size: int | None, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `group_size` None: one scale a row (channel); `ignore`: linears left as they are."""
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "actorder": None}
    weights |= {"strategy": "channel", "group_size": None} if group_size is None else {"strategy": "group", "group_size": group_size}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
