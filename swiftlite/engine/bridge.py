"""The hook between a stock transformers model and the paged engine.

One attention function is registered under the name `swift_pages`, and no mask function, so transformers never builds a mask. The
engine's metadata travels as an extra keyword of `model(...)` down to each attention call. What a model needs is not read off its
name but recorded: one tiny forward at load (the probe) lists every attention call with its geometry, scale, window and soft cap
and evaluates the model's own mask function; whatever is not understood is refused with a reason (the verdict).

Invariants: the attention function raises on every keyword that it does not know and that is not None, because an ignored one
would be silently wrong text; a layer's scale, window and soft cap are those of the probe in every later call; rows of different
sequences meet only inside attention (the probe checks it), so any mix of sequences may share a batch.
This module does not know about scheduling, sampling or adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from swiftlite.engine.attention_cpu import SequenceSlice, paged_attention
from swiftlite.engine.attention_native import NativeBatch
from swiftlite.engine.kv import AttentionLayer, KVCache
from swiftlite.engine.rope import freeze_rope
from swiftlite.errors import ModelError
from swiftlite.kernels.build import load_library
from swiftlite.kernels.steps import DTYPES

if TYPE_CHECKING:
    from swiftlite.engine.attention_cuda import DevicePages

NAME = "swift_pages"
PROBE_NAME = "swift_pages_probe"  # same function, but with a mask function, so that the probe sees the masks a model wants
FIX = "serve this model with the vLLM backend (--infer_backend vllm)"

# Keywords that carry no meaning for us beyond the checks in `_attend`; all others must be None.
IGNORED = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "output_router_logits"})
HANDLED = frozenset({"sliding_window", "softcap", "is_causal"})
REASONS = {"s_aux": "attention sinks", "indices": "sparse attention", "block_indices": "sparse attention"}


class Attention(Protocol):
    """What travels as the keyword `swift_pages`: the probe's recorder or a batch's pages."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> Tensor: ...


def swift_pages_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, Dk], roped
    key: Tensor,  # [1, G, T, Dk], new tokens only
    value: Tensor,  # [1, G, T, Dv]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    swift_pages: Attention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: returns ([1, T, H, Dv], None). ModelError on a keyword it does not know."""
    if swift_pages is None:
        raise ModelError("The engine's metadata did not reach an attention layer.", f"{type(module).__name__} drops keywords", FIX)
    for name, setting in kwargs.items():
        if name not in IGNORED and name not in HANDLED and setting is not None:
            what = REASONS.get(name, "an unknown attention option")
            raise ModelError(f"{type(module).__name__} uses {what} ({name}).", "the native engine does not handle it", FIX)
    if kwargs.get("is_causal") is False:
        raise ModelError(f"{type(module).__name__} is not causal.", "it asks for is_causal=False", FIX)
    if dropout:
        raise ModelError(f"{type(module).__name__} applies dropout.", "the model is not in eval mode")
    settings = {"scale": scaling, "window": kwargs.get("sliding_window"), "softcap": kwargs.get("softcap")}
    return swift_pages.attend(module, query[0], key[0], value[0], attention_mask, settings)[None], None


@dataclass
class ForwardBatch:
    """One step's rows, flattened over sequences."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    slots: Tensor  # [T] int64, where each row's K and V go; -1: nowhere
    sequences: list[SequenceSlice]
    logits_index: Tensor  # [S] int64, the rows whose logits are wanted, in the order wanted
    adapters: list[tuple[Any, int]] = field(default_factory=list)  # consecutive runs of rows (adapter version or None, count)
    pages: DevicePages | None = None  # `sequences` on the device, for the Triton kernels; None: attention in torch


@dataclass
class Pages:
    """A batch on its way through the layers."""

    bridge: Bridge
    cache: KVCache
    batch: ForwardBatch
    native: NativeBatch | None

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> Tensor:
        layer = self.bridge.layer_of[module]
        if settings["scale"] != self.bridge.scaling_of[module] or settings["softcap"] != layer.softcap:
            raise ModelError(f"{layer.name} changed its attention settings after the probe.", str(settings), FIX)
        if self.native is not None:
            return self.native.attend(layer, q, k, v)
        if self.batch.pages is not None:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            return self.batch.pages.attend(q, k, v, self.batch.slots, self.cache, layer)
        self.cache.store(layer.index, k.transpose(0, 1), v.transpose(0, 1), self.batch.slots)
        keys, values = self.cache.keys[layer.index], self.cache.values[layer.index]
        return paged_attention(q.transpose(0, 1), keys, values, self.batch.sequences, layer)


MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]


class _Recorder:
    """The probe: lists attention calls; its 'attention' keeps every row to itself (the row's own value)."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self.names = names
        self.layers: list[AttentionLayer] = []
        self.modules: list[nn.Module] = []
        self.scalings: list[float | None] = []
        self.masks: list[MaskFunction] = []

    def make_mask(self, mask_function: MaskFunction, **kwargs: Any) -> Tensor:
        """Stands in for the mask function: returns a mask filled with the number of `mask_function`."""
        self.masks.append(mask_function)
        shape = (1, 1, kwargs["q_length"], kwargs["kv_length"])
        return torch.full(shape, float(len(self.masks)), device=kwargs.get("device", "cpu"))

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> Tensor:
        name = self.names[module]
        if module in self.modules:
            raise ModelError(f"{name} is called twice in one forward.", "its cache cannot be told apart", FIX)
        heads, head_dim, kv_heads, value_dim = q.shape[0], q.shape[2], k.shape[0], v.shape[2]
        if heads % kv_heads or k.shape[1] != q.shape[1] or v.shape[0] != kv_heads:
            raise ModelError(
                f"{name} has an attention geometry that is not understood.", f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}", FIX
            )
        window = self._window(name, mask, settings["window"])
        scale = settings["scale"] if settings["scale"] is not None else head_dim**-0.5
        layer = AttentionLayer(len(self.layers), name, heads, kv_heads, head_dim, value_dim, float(scale), window, settings["softcap"])
        self.layers.append(layer)
        self.modules.append(module)
        self.scalings.append(settings["scale"])
        return v.repeat_interleave(heads // kv_heads, 0).transpose(0, 1)

    def _window(self, name: str, mask: Tensor | None, told: int | None) -> int | None:
        """The window of the mask that this layer got; ModelError unless it is plainly causal, with or without a window."""
        number = 0 if mask is None else int(mask.flatten()[0])
        if mask is None or not (0 < number <= len(self.masks)) or not bool((mask == number).all()):
            raise ModelError(f"{name} builds its own attention mask.", "it may hide a bias (ALiBi), a window or a prefix", FIX)
        far = 1 << 22
        try:
            window = _window_of(self.masks[number - 1], far)
        except ValueError as error:
            raise ModelError(f"{name} has an attention pattern that is neither causal nor a sliding window.", str(error), FIX) from error
        except Exception as error:
            raise ModelError(f"{name} has a mask that depends on the batch.", f"{type(error).__name__}: {error}", FIX) from error
        if told is not None and told != window:
            raise ModelError(f"{name} has two windows.", f"its mask keeps {window or 'all'} tokens, its keyword says {told}", FIX)
        return window


class _InputRecorder:
    """Which linears read the same input: siblings that got the very same tensor, in the order of their calls."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[tuple[str, Tensor]] = []  # holding the tensors keeps their identities apart
        linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
        self.hooks = [module.register_forward_pre_hook(self._recorder(name)) for name, module in linears]

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.calls.append((name, args[0]))

        return record

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def groups(self) -> list[list[str]]:
        """Groups of at least two module names; a module that was called more than once is in none."""
        found: dict[tuple[str, int], list[str]] = {}
        times = Counter(name for name, _ in self.calls)
        for name, tensor in self.calls:
            if times[name] == 1:
                found.setdefault((name.rpartition(".")[0], id(tensor)), []).append(name)
        self.calls.clear()
        return [group for group in found.values() if len(group) > 1]


def _window_of(mask: MaskFunction, far: int) -> int | None:
    """How many tokens, itself included, a query far from the start sees through `mask`; None: all. ValueError: another pattern."""

    def sees(query: int, key: int) -> bool:
        zero = torch.zeros((), dtype=torch.int64)
        return bool(mask(zero, zero, torch.tensor(query), torch.tensor(key)))

    low, high = 1, far + 1  # sees low tokens surely; binary search for the edge
    if not sees(far, far):
        raise ValueError("a token does not see itself")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sees(far, far - middle + 1) else (low, middle - 1)
    window = None if low == far + 1 else low
    reach = far + 1 if window is None else window
    for query in (0, 1, 7, reach - 1, reach, reach + 1, 3 * (reach // 2) + 5):
        for back in (-1, 0, 1, 2, reach - 2, reach - 1, reach, reach + 1):
            key = query - back
            if key >= 0 and query <= far and sees(query, key) != (0 <= back < reach):
                raise ValueError(f"query {query} and key {key} against a window of {window}")
    return window


class Bridge:
    """A probed model: its attention layers, its longest context, and `forward` over a mixed batch of sequences."""

    def __init__(self, model: PreTrainedModel, device: torch.device, max_model_len: int | None = None, *, kernels: bool = True) -> None:
        """Probe `model` (loaded with attention name swift_pages). ModelError names what the engine cannot run.

        `max_model_len` in tokens; None means what the model's positions allow. `kernels` False keeps to torch (the reference).
        """
        self.model, self.device = model, device
        self.library = load_library() if kernels and device.type == "cpu" and model.dtype in DTYPES else None
        self.layers: list[AttentionLayer] = []
        self.layer_of: dict[nn.Module, AttentionLayer] = {}
        self.shared_inputs: list[list[str]] = []  # names of linears that read the same input
        self.scaling_of: dict[nn.Module, float | None] = {}
        self._probe()
        self.max_model_len, self.notes = freeze_rope(model, max_model_len)

    @torch.inference_mode()
    def _probe(self) -> None:
        model = self.model
        kind = type(model).__name__
        _refuse_state(model)
        recorder = _Recorder({module: name for name, module in model.named_modules()})
        inputs = _InputRecorder(model)
        # Rows 0 and 2 are the same token at the same position. With attention that mixes nothing they must come out equal:
        # whatever else carries state from row to row (recurrence, convolution, batch-wide rope) would tell them apart.
        ids = torch.tensor([[3, 5, 3]], device=self.device)
        positions = torch.tensor([[1, 0, 1]], device=self.device)
        AttentionMaskInterface.register(PROBE_NAME, recorder.make_mask)
        AttentionInterface.register(PROBE_NAME, swift_pages_attention)
        try:
            model.set_attn_implementation(PROBE_NAME)
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),  # else transformers splits the rows by their positions
                position_ids=positions,
                use_cache=False,
                logits_to_keep=torch.tensor([0, 2], device=self.device),
                swift_pages=recorder,
            ).logits
        except ModelError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise ModelError(f"{kind} cannot be run by the native engine.", f"the probe failed with {reason}", FIX) from error
        finally:
            inputs.close()
            model.set_attn_implementation(NAME)
            AttentionMaskInterface.register(PROBE_NAME, _no_mask)  # the table is global: the recorder would keep the model for ever
        self._verdict(kind, recorder, logits)
        self.layers = recorder.layers
        self.layer_of = dict(zip(recorder.modules, recorder.layers, strict=True))
        self.scaling_of = dict(zip(recorder.modules, recorder.scalings, strict=True))
        self.shared_inputs = inputs.groups()

    def _verdict(self, kind: str, recorder: _Recorder, logits: Tensor) -> None:
        total, seen = self.model.config.get_text_config().num_hidden_layers, len(recorder.layers)
        if seen == 0:
            raise ModelError(
                f"{kind} does not call attention through transformers' interface.", "its keys and values stay out of reach", FIX
            )
        if seen != total:
            why = f"{seen} of its {total} layers call attention; the others are recurrent, convolutional or of another kind"
            raise ModelError(f"{kind} is not a plain attention model.", why, FIX)
        if logits.ndim != 3 or logits.shape[:2] != (1, 2):
            raise ModelError(f"{kind} ignores logits_to_keep.", f"logits of shape {[*logits.shape]}", FIX)
        difference = (logits[0, 0] - logits[0, 1]).abs().max().item()
        tolerance = 1e-4 if logits.dtype == torch.float32 else 0.02  # a half-precision product may round rows differently
        if not difference <= tolerance * logits.abs().max().item() + 1e-6:
            raise ModelError(f"{kind} mixes tokens outside attention.", f"equal rows differ by {difference:.3g}", FIX)

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """One step: logits [S, V] in the model's dtype for `batch.logits_index`; K and V of all rows are stored in `cache`."""
        native = None if self.library is None or batch.pages is not None else NativeBatch(self.library, cache, batch.slots, batch.sequences)
        with torch.inference_mode():
            output = self.model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                logits_to_keep=batch.logits_index,
                swift_pages=Pages(self, cache, batch, native),
            )
            return output.logits[0]


def _no_mask(mask_function: MaskFunction, **kwargs: Any) -> Tensor:
    raise AssertionError("no probe runs")


def _refuse_state(model: PreTrainedModel) -> None:
    """Refuse layers that carry state between tokens before they run: some only show it on longer inputs."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.RNNBase)):
            what = "convolution" if isinstance(module, nn.Conv1d) else "recurrent"
            raise ModelError(f"{type(model).__name__} has {what} layers ({name}).", "the native engine keeps only attention's cache", FIX)


AttentionInterface.register(NAME, swift_pages_attention)
