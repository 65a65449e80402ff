"""NEFTune (arXiv 2310.05914): uniform noise on the input embeddings while training, of size alpha / sqrt(T D) per document."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, alpha: float) -> None:
    """Noise from now on, in training mode only. T is a document's own length, so packing changes nothing."""
    lengths: tuple[int, ...] = ()

    def remember(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal lengths
        lengths = kwargs["swift_segments"]

    def disturb(embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:  # [1, T, D]
        if not embedding.training:
            return output
        counts = torch.tensor(lengths, device=output.device)
        size = alpha / (counts * output.shape[-1]).sqrt()  # [B]
        size = size.repeat_interleave(counts, output_size=output.shape[1])[None, :, None]  # [1, T, 1]
        return output + torch.empty_like(output).uniform_(-1, 1) * size.to(output.dtype)

    model.base_model.register_forward_pre_hook(remember, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(disturb)
