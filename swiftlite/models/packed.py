"""Linears whose weight lives in a layout made for products, and linears with one input fused into one product.

Packing is done once after loading, in place of the stock modules: the plain weight goes away, so memory does not grow. Weights
that anything else uses too stay plain, but for a tied output head: it multiplies by a packed copy, and of the plain weight only the
rows that are looked up stay in memory. A packed linear is an nn.Linear without `weight`; the parts of a fused one stay at their
places in the model under their own names, so adapters and messages know nothing of fusion.
Only for inference on a CPU, float32 and bfloat16; whether a model is packed never changes its results beyond rounding.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_reorder = torch.ops.mkldnn._reorder_linear_weight.default
_linear = torch.ops.mkldnn._linear_pointwise.default


class PackedWeight(Protocol):
    """A weight [out, in] in some layout."""

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., T, in] -> x W^T + bias [..., T, out]; T may be 0."""
        ...

    def to_dense(self) -> Tensor:
        """The plain weight [out, in], as a copy."""
        ...


class Pack(Protocol):
    def __call__(self, *weights: Tensor) -> PackedWeight:
        """Weights [out, in] of one input below each other, as one."""
        ...


class OneDnnWeight:
    """In oneDNN's own blocked layout."""

    def __init__(self, *weights: Tensor) -> None:
        self.packed = _reorder(join_rows(weights))

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[-2] == 0:  # no row wants logits; oneDNN refuses empty products
            return x.new_empty(*x.shape[:-1], self.packed.shape[0])
        return _linear(x, self.packed, bias, "none", [], "")

    def to_dense(self) -> Tensor:
        return self.packed.to_dense()


def join_rows(weights: Sequence[Tensor]) -> Tensor:
    """Weights [out, in] below each other; one alone is not copied."""
    return weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])


class PackedLinear(nn.Linear):
    """y = x W^T + b with W only in a packed layout; W is given as the weights that lie below each other in it."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None, pack: Pack = OneDnnWeight) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = sum(len(weight) for weight in weights), weights[0].shape[1]
        self.packed = pack(*weights)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.packed.multiply(x, self.bias)


class FusedLinear:
    """Several linears of one input as one product: the first part that is called computes all, the others take their columns.

    `parts` are (module name, out features) in order. A part that comes with another input just computes again, so the order and
    the number of calls do not matter for the result.
    """

    def __init__(self, parts: list[tuple[str, int]], product: PackedLinear) -> None:
        self.parts = parts
        self.widths = [width for _, width in parts]
        self.product = product
        self.x: Tensor | None = None
        self.results: Sequence[Tensor] = ()

    def part(self, index: int, x: Tensor) -> Tensor:
        """Columns of part `index` of x [..., in] -> [..., out of the part] (a view with the whole product's row stride)."""
        if self.x is not x:
            self.x, self.results = x, self.product(x).split(self.widths, dim=-1)
        result = self.results[index]
        if index == len(self.widths) - 1:
            self.x, self.results = None, ()
        return result


class FusedPart(nn.Linear):
    """One of a FusedLinear's parts, in the place of the linear that it was."""

    def __init__(self, fused: FusedLinear, index: int, in_features: int) -> None:
        nn.Module.__init__(self)
        self.fused, self.index = fused, index
        self.in_features, self.out_features = in_features, fused.widths[index]
        self.register_parameter("bias", None)  # it is in the fused product; nn.Linear's repr asks

    def forward(self, x: Tensor) -> Tensor:
        return self.fused.part(self.index, x)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has a product for this dtype on this machine that is worth it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def pack_linears(model: nn.Module, shared_inputs: Sequence[Sequence[str]], pack: Pack = OneDnnWeight) -> int:
    """Replace the stock linears of `model` by packed ones, those of one group in `shared_inputs` (module names) by a fused one.

    Linears with shared weights, with hooks or with a forward of their own (quantized) stay as they are. Returns how many linears
    were packed.
    """
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[parameter.data_ptr()] = uses.get(parameter.data_ptr(), 0) + 1
    names: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and type(module) is nn.Linear:
            names.setdefault(module, []).append(name)
    plain = {
        found[0]: module
        for module, found in names.items()
        if len(found) == 1 and uses[module.weight.data_ptr()] == 1 and _is_stock(module)
    }  # fmt: skip
    packed = 0
    for group in shared_inputs:
        if len(group) > 1 and all(name in plain for name in group):
            linears = [plain.pop(name) for name in group]
            parts = [(name, linear.out_features) for name, linear in zip(group, linears, strict=True)]
            fused = FusedLinear(parts, PackedLinear([linear.weight for linear in linears], _join_bias(linears), pack))
            for index, (name, linear) in enumerate(zip(group, linears, strict=True)):
                _replace(model, name, FusedPart(fused, index, linear.in_features))
                give_back(linear.weight)
            packed += len(group)
    while plain:
        name, linear = plain.popitem()
        _replace(model, name, PackedLinear([linear.weight], linear.bias, pack))
        give_back(linear.weight)
        packed += 1
    return packed


@torch.no_grad()
def pack_tied_head(model: PreTrainedModel, pack: Pack = OneDnnWeight) -> bool:
    """Let an output head that shares its weight with the input embedding multiply by a packed copy; False where there is none.

    The head stays an nn.Linear with its weight; only its `forward` changes.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or not isinstance(embedding, nn.Embedding) or head.weight is not embedding.weight or not _is_stock(head):
        return False
    packed, bias = pack(head.weight), None if head.bias is None else head.bias.detach()

    def forward(x: Tensor) -> Tensor:
        return packed.multiply(x, bias)

    head.forward = forward  # type: ignore[method-assign, assignment]
    if _is_in_file(head.weight, mapped_files()):
        give_back(head.weight)  # what is looked up comes back from the file
    return True


class Mapping(NamedTuple):
    """Addresses [first, end) that are a file from `offset` bytes on."""

    first: int
    end: int
    file: str
    offset: int


def mapped_files() -> list[Mapping]:
    """This process's memory that is unchanged parts of files."""
    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        return []
    found: list[Mapping] = []
    mapping: Mapping | None = None
    for line in maps.read_text().splitlines():
        head = line.split(maxsplit=5)
        if "-" in head[0] and not head[0].endswith(":"):  # an address range opens a mapping's entry
            first, end = (int(text, 16) for text in head[0].split("-"))
            is_file = len(head) == 6 and head[5].startswith("/")
            mapping = Mapping(first, end, head[5].rstrip("\n"), int(head[2], 16)) if is_file else None
        elif head[0] in ("Anonymous:", "Swap:") and head[1] != "0":
            mapping = None  # pages that were written to are the process's own
        elif head[0] == "Swap:" and mapping is not None:  # which comes after the other
            found.append(mapping)
    return found


def _is_in_file(weight: Tensor, files: list[Mapping]) -> bool:
    """Whether all of a weight's memory is in one of `files`."""
    first = weight.data_ptr()
    return any(file.first <= first and first + weight.nbytes <= file.end for file in files)


@contextmanager
def without_pages(model: nn.Module) -> Iterator[None]:
    """While this lasts, the pages of a linear's mapped weight are given back after each product: they come again from the file.

    For the few forwards before a model is quantized: else the whole plain model would be in memory once.
    """
    files = mapped_files()
    linears = [module for module in model.modules() if type(module) is nn.Linear and _is_in_file(module.weight, files)]
    hooks = [module.register_forward_hook(lambda module, *_: give_back(module.weight)) for module in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def give_back(weight: Tensor) -> None:
    """Give the whole pages of a weight that nobody reads any more back to the system now.

    Weights are views of the mapped checkpoint, and the mapping lives as long as any of them; without this, pages of replaced
    weights would stay resident and count as the process's memory.
    """
    if sys.platform != "linux" or not weight.is_contiguous():
        return
    first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages inside the weight: nobody else's
    length = (weight.data_ptr() + weight.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        _forget(first, length)


def give_back_files() -> None:
    """Give the pages of all mapped checkpoints back: what is still read comes again from the file.

    For a model whose weights are not the file's own: those that they were made from would stay resident with the mapping.
    """
    for mapping in mapped_files():
        if mapping.file.endswith(".safetensors"):
            _forget(mapping.first, mapping.end - mapping.first)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _forget(first: int, length: int) -> None:
    _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_DONTNEED))


def _is_stock(module: nn.Linear) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return "forward" not in vars(module) and not any(hooks) and module.weight.device.type == "cpu" and not module.training


def _join_bias(linears: list[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts: list[Tensor] = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    return torch.cat(list(parts))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module.eval())
