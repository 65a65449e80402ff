"""Cross entropy on target tokens only, without ever holding [T, V] logits.

Only the hidden states of target positions meet the output head, some rows at a time, and the gradient is computed on the
way (softmax minus one-hot is at hand then): two matrix products where recomputing takes three, three for a head that is
trained. A head that is more than a product (a bias, an adapter on it) is applied to the same rows and recomputed for its
gradient. Sums and softmax are float32. Heads with a logit scale or soft cap are covered; whether we understand a model's
head is checked by comparing with its own forward, and a head that we do not understand goes through that forward.

Does not know: batches' origin, optimizers. Divides by nothing: the caller knows the step's global number of targets.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swiftlite.kernels.gradients import gradients, takes
from swiftlite.models.device import base_dtype
from swiftlite.train.batches import Batch
from swiftlite.train.lora import TrainedCopy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 128 << 20  # of float32 logits


@dataclass(frozen=True)
class Head:
    """logits = cap(scale * hidden @ weight.T), cap(z) = softcap * tanh(z / softcap)."""

    module: nn.Module  # that owns the weight: where parameters are sharded it is another tensor in every pass
    dtype: torch.dtype  # of the products
    scale: float = 1.0
    softcap: float | None = None
    plain: bool = True  # False: the product is whatever `module` makes of the hidden states

    @property
    def weight(self) -> Tensor:  # [V, D]
        return self.module.get_parameter("weight")

    def logits(self, hidden: Tensor) -> Tensor:  # [N, D] -> [N, V] float32
        if self.plain:
            z = F.linear(hidden.to(self.dtype), self.weight.to(self.dtype)).float()
        else:
            z = self.module(hidden).float()
        z = z if self.scale == 1 else z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


def chunk(vocabulary: int) -> int:
    """Rows of logits that are held at once."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def filler(count: int) -> int:
    """Rows to add so that their number is one of at most 16 between two powers of 2: at most 1/16 more, 1/32 on average.

    oneDNN compiles a kernel for each new shape of a bfloat16 product, and keeps it: with every length its own, a small model
    spends a third of its time and a gigabyte on that.
    """
    return -count % max(1, 1 << count.bit_length() - 5) if count >= 32 else 0


def rounded(batch: Batch) -> Batch:
    """The batch with a last document of `filler` tokens that teaches nothing."""
    extra = filler(batch.input_ids.shape[1])
    if not extra:
        return batch
    ids = torch.cat((batch.input_ids, batch.input_ids[:, :1].expand(1, extra)), 1)
    positions = torch.cat((batch.position_ids, torch.arange(extra, device=ids.device)[None]), 1)
    return replace(batch, input_ids=ids, position_ids=positions, lengths=(*batch.lengths, extra))


class _ChunkedNLL(torch.autograd.Function):
    """(hidden [N, D], weight [V, D], labels [N], Head) -> (summed NLL, number of argmax hits)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: Head, smoothing: float, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        w = weight.to(head.dtype)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        total = torch.zeros((), dtype=torch.float32 if hidden.dtype != torch.float64 else torch.float64, device=hidden.device)
        hits = torch.zeros((), dtype=torch.int64, device=hidden.device)
        rows = max(1, min(chunk(len(weight)), len(labels)))
        # The same buffers for all chunks: fresh memory of this size would be zeroed page by page each time.
        shape = rows + filler(rows), len(weight)
        narrow = torch.empty(shape, dtype=head.dtype, device=hidden.device)
        simple = head.scale == 1 and head.softcap is None and smoothing == 0 and takes(narrow)
        kernels = gradients() if simple else None
        same = kernels is not None or head.dtype == total.dtype
        wide = narrow if same else torch.empty(shape, dtype=total.dtype, device=hidden.device)
        back = want_hidden or want_weight
        for start in range(0, len(labels), rows):
            h, label = hidden[start : start + rows].to(head.dtype), labels[start : start + rows, None]
            count = len(h)
            if head.dtype == torch.bfloat16 and h.device.type == "cpu":
                h, label = (F.pad(x, (0, 0, 0, filler(count))) for x in (h, label))
            z = torch.mm(h, w.t(), out=narrow[: len(h)])  # [n, V]
            factors = None if weights is None else weights[start : start + rows].to(total.dtype).contiguous()
            if kernels is not None:
                nll, hit = kernels.cross_entropy_(z[:count], label[:count, 0], factors, back=back)
            else:
                nll, hit = _cross_entropy_(z if wide is narrow else wide[: len(h)].copy_(z), label, head, smoothing, factors, back=back)
                if wide is not narrow and back:
                    z.copy_(wide[: len(h)])
            total += (nll[:count] if factors is None else nll[:count] * factors).sum()
            hits += hit[:count].sum()
            if not back:
                continue
            z[count:].zero_()  # the gradient of the logits by now
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = (z @ w)[:count]
            if grad_weight is not None:
                grad_weight += z.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
        )


def _cross_entropy_(
    z: Tensor, label: Tensor, head: Head, smoothing: float, factors: Tensor | None, *, back: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Products z [n, V], label [n, 1], factors of the first rows -> (nll [n], whether the label is the argmax [n]).

    With `back`, z becomes the gradient of the sum (of those first rows times their factors)."""
    if head.scale != 1:
        z.mul_(head.scale)
    slope = None
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = 1 - z * z
        z.mul_(head.softcap)
    at_label = z.gather(1, label)
    goal = at_label if smoothing == 0 else at_label.lerp(z.mean(1, keepdim=True), smoothing)
    top, best = z.max(1, keepdim=True)
    z.sub_(top).exp_()
    norm = z.sum(1, keepdim=True)
    nll = norm.log() + top - goal
    if back:
        z.div_(norm).scatter_add_(1, label, torch.full_like(at_label, smoothing - 1))  # softmax minus one-hot
        if smoothing:
            z.sub_(smoothing / z.shape[1])
        if slope is not None:
            z.mul_(slope)
        if head.scale != 1:
            z.mul_(head.scale)
        if factors is not None:
            z[: len(factors)].mul_(factors[:, None])
    return nll[:, 0], (best == label)[:, 0]


def chunked_nll(hidden: Tensor, labels: Tensor, head: Head, smoothing: float = 0.0, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """hidden [N, D], labels [N] -> (sum of -log p(label), float32; how many labels are the argmax, int64).

    With `smoothing` the goal is (1 - smoothing) of the label and the rest spread over all of the vocabulary; `weights` [N] are
    factors of the sum's parts."""
    return _ChunkedNLL.apply(hidden, head.weight, labels, head, smoothing, weights)


def applied_nll(
    hidden: Tensor, labels: Tensor, head: Head, vocabulary: int, smoothing: float = 0.0, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `chunked_nll`, for a head that is not plain. Its logits are computed again in the backward pass unless they are one chunk."""

    def part(h: Tensor, label: Tensor, weigh: Tensor | None) -> tuple[Tensor, Tensor]:
        count = len(h)
        if head.dtype == torch.bfloat16 and h.device.type == "cpu":
            h = F.pad(h, (0, 0, 0, filler(count)))
        return nll_of(head.logits(h)[:count], label, smoothing, weigh)

    rows, parts = chunk(vocabulary), []
    for start in range(0, len(labels), rows):
        at = slice(start, start + rows)
        inputs = hidden[at], labels[at], None if weights is None else weights[at]
        again = torch.is_grad_enabled() and len(labels) > rows
        parts.append(checkpoint(part, *inputs, use_reentrant=False) if again else part(*inputs))
    return torch.stack([nll for nll, _ in parts]).sum(), torch.stack([hits for _, hits in parts]).sum()


def nll_of(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits [N, V] float32 -> as `chunked_nll`."""
    hits = (logits.argmax(1) == labels).sum()
    if weights is None:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing), hits
    return (F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing) * weights).sum(), hits


class TargetLoss(nn.Module):
    """A model's loss on a Batch. `autocast`: the dtype of matrix products where the parameters are float32 masters;
    `smoothing`: of the labels, in training mode only. A module, so that every use of a parameter lies in one forward."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None = None, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.autocast, self.smoothing = model, autocast, smoothing
        self.onednn = self.device.type == "cpu" and (autocast or base_dtype(model)) == torch.bfloat16
        self.sharded = False  # then every process makes as many passes through the model
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.head = self._known_head()

    @property
    def device(self) -> torch.device:
        """Where the model is; sharding may move it."""
        return next(self.model.parameters()).device

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(summed NLL of the batch's targets, hits)."""
        smoothing = self.smoothing if self.model.training else 0.0
        if self.onednn:
            batch = rounded(batch)
        with self._precision():
            if self.head is None:
                return self._own(batch, smoothing)
            hidden = self._hidden(batch.input_ids, batch.position_ids, batch.lengths)[batch.keep]
            if self.head.plain:
                return chunked_nll(hidden, batch.labels, self.head, smoothing, batch.weights)
            return applied_nll(hidden, batch.labels, self.head, self.vocabulary, smoothing, batch.weights)

    def _own(self, batch: Batch, smoothing: float) -> tuple[Tensor, Tensor]:
        """Through the model's own forward. Without gradients it is run for some targets at a time: slower, in bounded memory."""
        count = len(batch.labels)
        size = count if torch.is_grad_enabled() or self.sharded else chunk(self.vocabulary)
        nll, hits = [], []
        for start in range(0, count, size):
            at = slice(start, start + size)
            logits = self.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, logits_to_keep=batch.keep[at],
                swift_segments=batch.lengths,
            ).logits[0].float()  # fmt: skip
            one = nll_of(logits, batch.labels[at], smoothing, None if batch.weights is None else batch.weights[at])
            nll.append(one[0])
            hits.append(one[1])
        return torch.stack(nll).sum(), torch.stack(hits).sum()

    def _precision(self) -> AbstractContextManager:
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)

    def _hidden(self, input_ids: Tensor, position_ids: Tensor, lengths: tuple[int, ...]) -> Tensor:  # [T, D]
        body = self.model.base_model
        return body(input_ids=input_ids, position_ids=position_ids, use_cache=False, swift_segments=lengths).last_hidden_state[0]

    @torch.no_grad()
    def _known_head(self) -> Head | None:
        """The head, when four tokens show that it is what we think it is; None: use the model's own forward."""
        if self.model.base_model is self.model:
            return None
        module: nn.Module = self.model.get_output_embeddings()
        own, dtype = module, self.autocast
        if isinstance(module, TrainedCopy):
            dtype = module.dtype
            module = module.whole
        plain = type(module) is nn.Linear and module.bias is None
        config = self.model.config.to_dict()
        scale = config.get("logit_scale") or config.get("lm_head_multiplier") or 1 / (config.get("logits_scaling") or 1)
        softcap = config.get("final_logit_softcapping") or config.get("logits_soft_cap")
        head = Head(module if plain else own, dtype or next(module.parameters()).dtype, scale, softcap, plain)
        ids = torch.arange(4, device=self.device)[None]
        training = self.model.training
        self.model.eval()
        with self._precision():
            stock, hidden = self._stock(ids)
            mine = head.logits(self._hidden(ids, ids, (4,)) if hidden is None else hidden)
        self.model.train(training)
        close = 1e-4 if head.dtype in (torch.float32, torch.float64) else 3e-2
        same = mine.shape == stock.shape and torch.allclose(mine, stock, rtol=close, atol=close * stock.abs().max().item())
        return head if same else None

    def _stock(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's own logits [T, V] of one document, and what `_hidden` gives for it [T, D], where the model called its body just
        as we do: to call it again would take as long. None: it called it otherwise."""
        asked = {"input_ids": ids, "position_ids": ids, "swift_segments": (ids.shape[1],)}
        calls: list[tuple[Any, dict[str, Any], Any]] = []
        listener = self.model.base_model.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
        try:
            logits = self.model(**asked, use_cache=False).logits[0].float()
        finally:
            listener.remove()
        if len(calls) != 1:
            return logits, None
        args, keywords, output = calls[0]
        said = {name: value for name, value in keywords.items() if value is not None and value is not False}
        alike = not args and said.keys() == asked.keys() and all(said[name] is asked[name] for name in asked)
        return logits, output.last_hidden_state[0] if alike else None
