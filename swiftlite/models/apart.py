"""Whether a model keeps documents that lie end to end apart: asked of the model itself, once, before it is trained.

Our attention does (segments.py). But a convolution or a recurrent state runs on from one document into the next, and some
models' layers do not hand down to attention where documents end, or how far they look back. Such models are right only with
one document a forward pass.

Does not know: plans, flags. The caller decides what follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swiftlite.errors import ModelError
from swiftlite.models.loading import quiet
from swiftlite.models.segments import NAME, Unheard, attend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE = NAME + "_probe"
RUNS_ON = "a layer (a convolution, a recurrent state, attention of its own) carries values on from one row into the next"
LENGTH = 8  # tokens a document: more than a convolution's kernel


def why_not(model: PreTrainedModel) -> str | None:
    """None: documents stay apart. Else why they do not; where our attention would not hear of what it needs, the model has the
    stock one from here on. ModelError for a model that cannot run on documents at all."""
    training = model.training
    try:
        leaks = _leaks(model.eval())
    except Unheard as error:
        return _on_stock(model, error.why)
    except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        raise ModelError(f"cannot train {type(model).__name__}", f"its forward pass fails: {type(error).__name__}: {error}") from error
    finally:
        model.train(training)
    with quiet():
        model.set_attn_implementation(NAME)
    return RUNS_ON if leaks else None


def _on_stock(model: PreTrainedModel, why: str) -> str:
    with quiet():
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:  # the model has no code for it
            model.set_attn_implementation("eager")
    return why


def _leaks(model: PreTrainedModel) -> bool:
    """Whether a second document's logits depend on the first. The gradient by the first one's embeddings is exactly zero only
    where nothing passes; other values in the first would need a tolerance, for experts' products round by what else they hold.

    Unheard when a window, or chunks, are asked for in a mask alone: ours is never built.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    embedded: list[Tensor] = []
    masked: list[int] = []
    unsaid: list[nn.Module] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # a few models scale it in place

    def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> None:
        if local_size:  # 0: a window that no layer uses
            masked.append(local_size)

    def listen(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if "sliding_window" not in kwargs:
            unsaid.append(module)
        return attend(module, *args, **kwargs)

    AttentionMaskInterface.register(PROBE, mask)
    AttentionInterface.register(PROBE, listen)
    with quiet():  # of models that have attention code of their own
        model.set_attn_implementation(PROBE)
    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        device = next(model.parameters()).device
        ids = torch.arange(2 * LENGTH, device=device)[None] % model.config.get_text_config().vocab_size
        positions = torch.arange(LENGTH, device=device).repeat(2)[None]
        with torch.enable_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False, swift_segments=(LENGTH, LENGTH)).logits
            (grad,) = torch.autograd.grad(logits[0, LENGTH:].float().square().mean(), embedded[:1])
    finally:
        hook.remove()
    if masked and unsaid:
        raise Unheard(f"{type(unsaid[0]).__name__} cannot be packed", "its layers do not tell attention how far to look back")
    return bool((grad[0, :LENGTH] != 0).any())
