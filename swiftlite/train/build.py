"""What is trained, built from the flags: the adapter or the full model, quantization of the base, gradient checkpointing.

The first place that knows both the flags and the parts; it knows neither rows nor the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swiftlite.errors import UsageError
from swiftlite.options.parse import Options

PLAIN = (False, "none", "true", False)  # LoRA without --use_dora, --lora_bias, --init_weights, all-embedding


def lora(options: Options, model: Any, start_from: Path | None, resumed: Path | None) -> Any:
    from transformers.pytorch_utils import Conv1D

    from swiftlite.train.lora import Lora, LoraSpec

    source = resumed or start_from
    embeddings = "all-embedding" in options.target_modules
    turned = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's linears, which only PEFT adapts
    if turned and options.fsdp:
        raise UsageError("--fsdp shards plain LoRA and full training", f"{type(model).__name__} needs PEFT's layers", "leave out --fsdp")
    if (options.quant_bits or turned) and source is not None:  # PEFT knows quantized linears
        from swiftlite.train.peft_lora import PeftLora

        return PeftLora.read(model, source)
    variant = options.use_dora, options.lora_bias, options.init_weights, embeddings
    if source is not None and variant == PLAIN and not LoraSpec.is_plain(source):
        from swiftlite.train.peft_lora import PeftLora

        print(f"adapter from {source}: its own settings, through PEFT")
        return PeftLora.read(model, source)
    if variant != PLAIN or options.quant_bits or turned:
        from swiftlite.train.peft_lora import PeftLora, Variant

        if start_from is not None:
            raise UsageError("an adapter that is trained on keeps its own kind", fix="leave out the flags that choose one, or --adapters")
        print("adapter: through PEFT's own layers, slower than plain LoRA")
        return PeftLora(model, _spec(options), Variant(*variant))
    if source is not None:
        spec = LoraSpec.read(source)
        print(f"adapter from {source}: rank {spec.rank}, alpha {spec.alpha:g} (its own settings)")
    else:
        spec = _spec(options)
    lora = Lora(model, spec)
    if source is not None:
        lora.load(source)
    return lora


def mixed(tuner: Any) -> bool:
    """Whether float32 masters are used as they are, so that products need autocast to run in the model's dtype. Plain LoRA casts
    its own; in PEFT's layers a trained bias, embedding, norm or head would meet a bfloat16 neighbour."""
    from swiftlite.train.full import Full
    from swiftlite.train.peft_lora import PeftLora

    return isinstance(tuner, (Full, PeftLora))


def quantized(options: Options, dtype: Any) -> dict[str, Any]:
    """QLoRA (arXiv 2305.14314): NF4 with doubly quantized scales, products in the run's dtype."""
    if not options.quant_bits:
        return {}
    from transformers import BitsAndBytesConfig

    four = options.quant_bits == 4
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def keep_layout(model: Any) -> None:
    """No packing for inference: bitsandbytes 0.50 packs at the first forward pass in eval mode, and a backward pass through
    packed weights gives wrong gradients (norm 0.53 in place of 2.28) without an error."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def fuse_steps(options: Options, model: Any, tuner: Any) -> None:
    """Norms, rotation and gates in one pass each way, on a CPU, where only a plain adapter is trained on whole weights."""
    from swiftlite.kernels.gradients import gradients
    from swiftlite.kernels.steps import DTYPES
    from swiftlite.models.device import base_dtype
    from swiftlite.models.fused import fuse

    if mixed(tuner) or options.fsdp or options.torch_compile or options.quant_bits:
        return
    dtype = base_dtype(model)
    if model.device.type != "cpu" or dtype not in DTYPES or (kernels := gradients()) is None:
        return
    training = model.training
    fuse(model.eval(), kernels, dtype)
    model.train(training)


def _spec(options: Options) -> Any:
    from swiftlite.train.lora import LoraSpec

    return LoraSpec(
        options.lora_rank, options.lora_alpha, options.lora_dropout, options.use_rslora, options.target_modules, options.modules_to_save
    )


def freezing(options: Options) -> Any:
    from swiftlite.train.full import Freezing

    settings = options.freeze_parameters_ratio, options.freeze_parameters_regex, options.trainable_parameters_regex
    return None if settings == (0.0, None, None) else Freezing(*settings)


def alone(options: Options, model: Any, ranks: Any) -> bool:
    """Whether every row needs a forward pass of its own; says why. UsageError where packing was asked for."""
    from swiftlite.models import apart

    reason = next((reason for reason in ranks.gather(apart.why_not(model)) if reason), None)
    if reason is None:
        return False
    if options.packing and options.given("packing"):
        raise UsageError(
            f"{type(model).__name__} cannot be trained with --packing true", f"rows would see each other: {reason}",
            "use --packing false: every row then gets a forward pass of its own, which is slower",
        )  # fmt: skip
    options.set("packing", False, "chosen")  # a resumed run asks for the same
    print(f"one row a forward pass, without packing, which is slower ({type(model).__name__}: {reason})")
    return True


def note_experts(model: Any) -> None:
    """Whether the router's own loss is trained on, where there is one."""
    config = model.config.get_text_config().to_dict()
    if "router_aux_loss_coef" in config:
        unless = "although its config sets output_router_logits" if config.get("output_router_logits") else "as in transformers' default"
        print(f"experts: the router's balancing loss is not part of the loss ({unless})")


PROBED = 128  # tokens: what a token keeps is within 10 % the same from 64 to 2048 of them, and a long row takes seconds


def _beginning(row: Any) -> Any:
    """The row's first tokens, the last of them a target."""
    from swiftlite.data.store import Sample

    mask = row.mask[:PROBED].copy()
    mask[-1] = True
    return Sample(row.ids[:PROBED], mask)


def checkpointing(options: Options, model: Any, loss: Any, largest: Sequence[Any], trained: int, ranks: Any) -> bool:
    """Decide on gradient checkpointing; says why."""
    from swiftlite.train import memory
    from swiftlite.train.batches import collate
    from swiftlite.train.loss import CHUNK_BYTES

    on, reason = options.gradient_checkpointing, "as asked"
    if on is None and options.fsdp is not None:
        on, reason = True, "who shards is short of memory; --gradient_checkpointing false is faster"
    elif on is None:
        batch = collate([_beginning(largest[0])], loss.device)
        tokens = sum(len(sample.ids) for sample in largest)
        model.train()
        kept = memory.kept_bytes(model, lambda: loss(batch)[0]) / batch.input_ids.shape[1] * tokens
        logits = 4 * sum(int(sample.mask.sum()) for sample in largest) * model.config.get_text_config().vocab_size
        need = kept + 12 * trained + 3 * min(CHUNK_BYTES, logits)  # gradients and two moments in float32; the loss's chunk
        free = memory.free(loss.device) // (ranks.local_world if loss.device.type == "cpu" else 1)
        on = need > 0.9 * free
        reason = f"the largest pass of {tokens} tokens needs about {need / memory.GB:.2g} GB, {free / memory.GB:.1f} GB are free"
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    print(f"gradient checkpointing: {'on' if on else 'off'} ({reason})")
    return bool(on)


def compiling(options: Options, model: Any, device: Any, checkpointed: bool, ranks: Any) -> None:
    """--torch_compile, where it can be done in every process."""
    if not options.torch_compile:
        return
    from swiftlite.train import compiled

    reason = next((reason for reason in ranks.gather(compiled.unavailable(device)) if reason), None)
    if reason:
        print(f"--torch_compile: nothing can be compiled here ({reason}); training goes on without")
        return
    count = compiled.compile_layers(model, checkpointed)
    print(f"compiling {count} modules: the first steps are slow")


def sharding(options: Options, loss: Any, device: Any, everything: int) -> None:
    """--fsdp: split the model, on `device` from here on. `everything`: its number of parameters."""
    if options.fsdp is None:
        return
    from swiftlite.train.shard import held, shard

    shard(loss, device, options.fsdp)
    mine = held(loss)
    print(f"sharded ({options.fsdp}): this process holds {mine:,} of {everything:,} parameters ({mine / everything:.1%})")


def weights(tuner: Any, loss: Any, ranks: Any, sharded: bool) -> dict[str, Any]:
    """What a checkpoint's weights are made of; sharded: whole in the first process, {} in the others, all of which must call."""
    if not sharded:
        return dict(tuner.tensors())
    from swiftlite.train.shard import drop_gathered, gather

    drop_gathered(loss)
    return gather(tuner.tensors(), ranks.first)
