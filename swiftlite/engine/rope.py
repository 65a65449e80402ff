"""Rotary embeddings that depend on the longest sequence of a batch, made independent of it.

`dynamic` rope rescales once a sequence outgrows the trained length: the context is capped there, and the trained frequencies are
frozen, as transformers would look at the device for the longest position in every forward. `longrope` has a short and a
long set of frequencies chosen by the batch's longest position, so one long request would change the others' text and the cached
keys would disagree: one set is chosen at load, from max_model_len, and frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from swiftlite.errors import ModelError


def freeze_rope(model: PreTrainedModel, wanted: int | None) -> tuple[int, list[str]]:
    """The context length in tokens (`wanted`, or all that the model allows) and notes for the user; freezes what changes, in place.

    ModelError when `wanted` is more than the model's positions.
    """
    config = model.config.get_text_config()
    try:
        limit = config.max_position_embeddings
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} names no longest position.", "config.max_position_embeddings is missing") from error
    notes: list[str] = []
    kinds = _rope_kinds(config)
    if any("dynamic" in parameters["rope_type"] for parameters in kinds.values()):
        # transformers rescales beyond original_max_seq_len, which it takes from max_position_embeddings
        notes.append(f"dynamic rope: context capped at the trained {limit} tokens")
    if wanted is not None and wanted > limit:
        raise ModelError(f"max_model_len {wanted} is more than the model's {limit} positions.", fix=f"use at most {limit}")
    length = limit if wanted is None else wanted
    modules = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    for layer_type, parameters in kinds.items():
        if "dynamic" in parameters["rope_type"]:
            for module in modules:
                _freeze(module, layer_type)
        if parameters["rope_type"] == "longrope":
            original = parameters["original_max_position_embeddings"]
            for module in modules:
                _freeze_longrope(module, layer_type, length > original, original)
            notes.append(
                f"longrope: {'long' if length > original else 'short'} factors for all (max_model_len {length}, trained {original})"
            )
    return length, notes


def _rope_kinds(config) -> dict[str | None, dict]:
    """Rope parameters by layer type; {None: ...} when all layers share them, empty when the model has no rope."""
    try:
        parameters = config.rope_parameters
    except AttributeError:  # learned positions (gpt2, opt)
        return {}
    if not parameters:
        return {}
    if "rope_type" in parameters:
        return {None: parameters}
    return {name: own for name, own in parameters.items() if own}


def _freeze_longrope(module: Any, layer_type: str | None, use_long: bool, original: int) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    if use_long:
        buffer = module.get_buffer(f"{prefix}inv_freq")
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, buffer.device, seq_len=original + 1, layer_type=layer_type)
        with torch.no_grad():
            buffer.copy_(frequencies)
    _freeze(module, layer_type)


def _freeze(module: Any, layer_type: str | None) -> None:
    # the update in transformers' forward keys on this name; the frequencies are fixed from here on
    if layer_type is None:
        module.rope_type = "frozen"
    else:
        module.rope_type[layer_type] = "frozen"
