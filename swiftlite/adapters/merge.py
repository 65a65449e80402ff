"""Base + adapter -> one model directory, without building the model: W32 = W.float() + update, rounded once to W's dtype.

Plan first: every tensor of the adapter is matched with the base's, and every shape checked, before a byte is written. Then
one shard at a time. Then the result is loaded and compared with base + adapter, and only then does it appear under its name.
The adapter's tokenizer, template and settings go with it. Quantized bases are refused: merge into the 16-bit base.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftlite.adapters.directory import Adapter, LoraWeights, read
from swiftlite.errors import AdapterError, ModelError
from swiftlite.models.shards import CARRIED_FILES, TOKENIZER_FILES, Shards, copy_files, new_directory, open_shards, read_config, rewrite
from swiftlite.options.resolve import ARGS_FILES

Log = Callable[[str], None]
# Largest relative difference of the logits, after the base's own rounding: a wrong merge is off by tens of percent.
TOLERANCE = {"F32": 1e-3, "F64": 1e-3}
TOLERANCE_16_BIT = 0.1


@dataclass
class Plan:
    """What happens to which key of the base's checkpoint."""

    updates: dict[str, LoraWeights] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)  # rows that are replaced
    biases: dict[str, LoraWeights] = field(default_factory=dict)  # LoRA bias, added to the module's own
    untie: bool = False  # embedding and head part
    split: tuple[str, str] | None = None  # (embedding, head) when the head has no tensor of its own yet
    transpose: bool = False


def merge(
    base_dir: str | Path, adapter_dir: str | Path, out_dir: str | Path, *, exist_ok: bool = False, verify: bool = True, log: Log = print
) -> Path:
    """Write base + adapter to `out_dir`. AdapterError / ModelError before anything is written; nothing appears half-done."""
    config = read_config(base_dir)
    if config.get("quantization_config"):
        raise ModelError(f"{base_dir} is quantized", "an update cannot be added to quantized weights", "pass the 16-bit base as --model")
    shards = open_shards(base_dir)
    adapter = read(adapter_dir, _names(shards))
    plan = make_plan(adapter, shards, config)
    log(f"merging {len(adapter.modules)} modules (rank {adapter.max_rank}) of {adapter_dir} into {base_dir}")
    with new_directory(out_dir, exist_ok=exist_ok, needs=shards.nbytes + (64 << 20), sources=(base_dir, adapter_dir)) as work:
        rewrite(shards, work, lambda key, tensor: apply(plan, key, tensor), log)
        if plan.untie:
            config["tie_word_embeddings"] = False
        (work / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        carry(Path(base_dir), Path(adapter_dir), work)
        if verify:
            check(Path(base_dir), Path(adapter_dir), work, shards, log)
    log(f"merged model: {out_dir}")
    return Path(out_dir)


def _names(shards: Shards) -> dict[str, tuple[int, int]]:
    """Module shapes of the checkpoint; a tied head, which has no tensor of its own, has the embedding's shape."""
    shapes = shards.module_shapes()
    embedding = next((name for name in shapes if name.endswith("embed_tokens")), None)
    if embedding:
        shapes.setdefault("lm_head", shapes[embedding])
    return shapes


def make_plan(adapter: Adapter, shards: Shards, config: dict[str, Any]) -> Plan:
    """Every tensor of the adapter gets its place in the base's checkpoint; AdapterError for those that have none."""
    plan = Plan(replaced={**adapter.saved, **adapter.bases}, transpose=adapter.config.fan_in_fan_out)
    plan.updates = {name + ".weight": weights for name, weights in adapter.modules.items()}
    for name, weights in adapter.modules.items():
        if weights.bias is not None:
            plan.biases[name + ".bias"] = weights
    plan.tokens = {name + ".weight": trained for name, trained in adapter.tokens.items()}
    for key, tensor in plan.replaced.items():
        if key in shards.tensors and tuple(tensor.shape) != shards.tensors[key].shape:
            why = f"{key} is {list(tensor.shape)} in the adapter and {list(shards.tensors[key].shape)} in the base"
            raise AdapterError(f"the adapter in {adapter.path} belongs to another base model", why, "use the base that it was trained on")
    wanted = {*plan.updates, *plan.replaced, *plan.biases, *plan.tokens}
    head = "lm_head.weight"
    embedding = next((key for key in shards.tensors if key.endswith("embed_tokens.weight")), None)
    tied = head not in shards.tensors or bool(config.get("tie_word_embeddings"))
    # Rows of trained tokens stay tied, unless the head has its own.
    if embedding and tied and (wanted - {*plan.tokens} | {*plan.tokens} - {embedding}) & {head, embedding}:
        _plan_tied(plan, adapter, head)
        if head not in shards.tensors:
            wanted.discard(head)
            plan.split = (embedding, head) if plan.untie else None
    missing = sorted(key for key in wanted if key not in shards.tensors)
    if missing:
        raise AdapterError(
            f"the adapter in {adapter.path} belongs to another base model",
            f"the base has no tensor {missing[0]}" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""),
            "use the base that it was trained on",
        )
    return plan


def _plan_tied(plan: Plan, adapter: Adapter, head: str) -> None:
    """Embedding and head share one tensor and one of them is adapted: they part, unless the adapter has one update for both."""
    adapts = {*plan.updates, *plan.replaced}
    if adapter.config.ensure_weight_tying and head not in adapts:
        return
    plan.untie = True


def apply(plan: Plan, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The new tensors that stand for one of the base's."""
    yield key, _new(plan, key, tensor)
    if plan.split and key == plan.split[0]:
        yield plan.split[1], _new(plan, plan.split[1], tensor).clone()


def _new(plan: Plan, key: str, tensor: Tensor) -> Tensor:
    base = plan.replaced.get(key, tensor)
    if key in plan.tokens:
        tokens, rows = plan.tokens[key]
        base = base.index_copy(0, torch.tensor(tokens), rows.to(base.dtype))
    weights = plan.updates.get(key)
    if weights is not None:
        return merged_weight(base, weights, plan.transpose).to(tensor.dtype)
    if key in plan.biases:
        weights = plan.biases[key]
        return (base.float() + weights.scale * weights.bias.float()).to(tensor.dtype)  # type: ignore[union-attr]
    return base.to(tensor.dtype)


def merged_weight(base: Tensor, weights: LoraWeights, transpose: bool = False) -> Tensor:
    """fp32 merged weight; `base` is [out, in], or [in, out] with `transpose` (GPT-2's Conv1D) and for embeddings."""
    update = weights.scale * (weights.b.float() @ weights.a.float())  # [out, in]
    if weights.embedding:
        return base.float() + update.T
    whole = (base.float().T if transpose else base.float()) + update
    if weights.magnitude is not None:  # DoRA: every output row gets the learnt length
        whole = whole * (weights.magnitude.float() / whole.norm(dim=1))[:, None]
    return whole.T if transpose else whole


def carry(base_dir: Path, adapter_dir: Path, out: Path) -> None:
    """Tokenizer, template and generation settings of the adapter, else of the base; the run's settings as those of a full model."""
    own_tokenizer = any((adapter_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if own_tokenizer:
        copy_files(adapter_dir, out, CARRIED_FILES)
    copy_files(base_dir, out, [p for p in CARRIED_FILES if not (own_tokenizer and p in TOKENIZER_FILES)])
    if not own_tokenizer:
        copy_files(adapter_dir, out, CARRIED_FILES)
    for name in ARGS_FILES:
        if (adapter_dir / name).is_file():
            try:
                settings = json.loads((adapter_dir / name).read_text(encoding="utf-8"))
            except ValueError:
                continue
            full = {key: "full" for key in ("tuner_type", "sft_type", "train_type") if key in settings} or {"tuner_type": "full"}
            # The merged directory is the model from now on; the base's name must not be taken for it.
            unset = dict.fromkeys(key for key in ("model", "model_id_or_path", "ckpt_dir", "adapters") if key in settings)
            merged = {**settings, **full, **unset, "merged_from": {"base": str(base_dir), "adapter": str(adapter_dir)}}
            (out / name).write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check(base_dir: Path, adapter_dir: Path, merged_dir: Path, shards: Shards, log: Log) -> None:
    """Compare fp32 logits of PEFT's base + adapter with the merged model, reloaded, on random prompts.

    AdapterError when they differ by more than the base dtype's rounding explains. Skipped, and said so, where the model does
    not fit into memory in fp32.
    """
    needs = int(sum(4 * info.nbytes / (2 if info.dtype in ("F16", "BF16") else 4) for info in shards.tensors.values()) * 1.3)
    import psutil

    free = psutil.virtual_memory().available
    if needs > free:
        log(f"check skipped: it needs {needs / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free")
        return
    from peft import PeftModel

    base = _load(base_dir)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, base.config.get_text_config().vocab_size, (4, 16), generator=generator)
    adapted = PeftModel.from_pretrained(base, adapter_dir)
    expected = _logits(adapted, prompts)
    del adapted, base
    got = _logits(_load(merged_dir), prompts)
    difference = (got - expected).abs().max().item()
    relative = ((got - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm()).item()
    agreement = (got.argmax(-1) == expected.argmax(-1)).float().mean().item()
    log(f"check: logits of base + adapter and merged differ by at most {difference:.2e} ({relative:.1e} relative)")
    log(f"check: top-1 agrees on {agreement:.1%} of {prompts.numel()} random positions")
    dtypes = {info.dtype for info in shards.tensors.values()}
    if not relative <= max(TOLERANCE.get(dtype, TOLERANCE_16_BIT) for dtype in dtypes):
        raise AdapterError(
            "the merged model does not answer like base + adapter",
            f"its logits are off by {relative:.1%}",
            "this is a defect: please report the adapter's adapter_config.json; nothing was written",
        )


def _load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    from swiftlite.models.loading import quiet

    with quiet():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()


@torch.inference_mode()
def _logits(model: Any, prompts: Tensor) -> Tensor:
    return model.eval()(input_ids=prompts, use_cache=False).logits.float()
