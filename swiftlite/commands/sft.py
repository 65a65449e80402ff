"""`swift sft`: options -> rows, model, tuner, plan -> the loop -> a run's folder.

Only composes: what a part decides is in the part. Everything that the user could have got wrong is checked before the
model is loaded, and nothing is written before everything is checked.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swiftlite import __version__, startup
from swiftlite.later import compiler_later
from swiftlite.options.parse import Options
from swiftlite.options.resolve import as_json


def main(options: Options) -> int:
    """Train, in several processes where NPROC_PER_NODE says so; 0 when done or ended by SIGTERM, 130 after Ctrl-C."""
    from swiftlite.train import interrupt, launch

    if processes := launch.wanted():
        return launch.launch(sys.argv[1:], processes)
    # one of several dies at once: it may be waiting for the others where Python hears no signal
    with contextlib.nullcontext() if "RANK" in os.environ else interrupt.starting():
        try:
            return 130 if sft(options)["interrupted"] == signal.SIGINT else 0
        except interrupt.Terminated:
            print(launch.NOT_BEGUN)
            return 0


def sft(options: Options) -> dict[str, Any]:
    """Train as the options say; returns the run's info: last_model_checkpoint, best_model_checkpoint, best_metric,
    global_step, train_time_s, tokens, memory_gb, run_dir, interrupted (signal number or None)."""
    from swiftlite.train import deepspeed, flags
    from swiftlite.train.ranks import Ranks

    ranks = Ranks.here()
    deepspeed.apply(options, ranks.world)
    resumed = Path(options.resume_from_checkpoint).resolve() if options.resume_from_checkpoint else None
    before = flags.read_resumed(options, resumed) if resumed else ({}, None, {})
    start_from = None if resumed else flags.start_from(options)
    model_dir = flags.check(options)
    single = ranks.world == 1 and options.fsdp is None and not options.torch_compile
    startup.begin(model_dir, alone=single)
    from swiftlite.models.device import choose_device

    device = choose_device(ranks.device(options.device))
    with ranks.joined(device), compiler_later() if single else contextlib.nullcontext():
        return _train(options, ranks, device, model_dir, start_from, resumed, *before)


def _train(
    options: Options, ranks: Any, device: Any, model_dir: Path, start_from: Path | None, resumed: Path | None, state: dict[str, Any],
    tensors: dict[str, Any] | None, saved: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    import torch

    from swiftlite.chat.template import Template
    from swiftlite.models.device import TORCH_DTYPES, choose_dtype
    from swiftlite.models.loading import load_config, load_tokenizer
    from swiftlite.train import material
    from swiftlite.train.plan import Schedule

    config = load_config(model_dir)
    dtype = TORCH_DTYPES[saved["resolved"]["torch_dtype"]] if resumed else choose_dtype(options.torch_dtype, device, _dtype_name(config))
    dtype = ranks.agree(dtype)  # it may have been measured
    tokenizer = load_tokenizer(model_dir)
    template = Template.load(model_dir, tokenizer, name=options.template, system=options.system)
    max_length = _max_length(options, config)
    planned_for = state["processes"] if resumed else ranks.world  # what a step holds stays, whoever computes it
    rows = material.prepare(options, template, max_length, planned_for)
    samples, evaluation, plan = rows.samples, rows.evaluation, rows.plan
    total = plan.total_steps(options.num_train_epochs, options.max_steps)
    if resumed:
        from swiftlite.train.resume import check_fit

        check_fit(state, resumed, rows.fingerprint, total, ranks.world)
    from swiftlite.commands import answers
    from swiftlite.train.push import Push

    positions = config.get_text_config().max_position_embeddings
    questions = answers.asked(options, rows.conversations, template, positions)
    push = Push.ready(options, _run_name(options)) if ranks.first else None
    options.set("hub_token", None, "default")  # from here on settings are written down
    print(plan.describe())
    from swiftlite.train.show import with_mask

    print(f"one row; what is learnt is marked:\n{with_mask(samples[0], tokenizer)}")

    from swiftlite.models.loading import load_model
    from swiftlite.models.segments import register
    from swiftlite.train import build, neftune
    from swiftlite.train.full import Full, write_generation_config
    from swiftlite.train.loop import LoopSettings, Trainer
    from swiftlite.train.loss import TargetLoss
    from swiftlite.train.optimizers import OptimizerSettings

    full, sharded = options.tuner_type == "full", options.fsdp is not None
    torch.manual_seed(options.seed)
    began = time.perf_counter()
    model = load_model(
        resumed if resumed and full else model_dir,
        torch.float32 if full else dtype,
        torch.device("cpu") if sharded else device,
        register(),
        **build.quantized(options, dtype),
    )
    if options.quant_bits == 4 and device.type == "cpu":
        build.keep_layout(model)
    alone = build.alone(options, model, ranks)
    if alone:
        plan = plan.alone()
        total = plan.total_steps(options.num_train_epochs, options.max_steps)
        print(plan.describe())
    build.note_experts(model)
    tuner: Any = Full(model, dtype, build.freezing(options)) if full else build.lora(options, model, start_from, resumed)
    if tensors is not None:
        tuner.load_masters(tensors.get("masters", {}))
    build.fuse_steps(options, model, tuner)
    loss = TargetLoss(model, dtype if build.mixed(tuner) and dtype != torch.float32 else None, options.label_smoothing_factor)
    if options.neftune_noise_alpha is not None:
        neftune.attach(model, options.neftune_noise_alpha)
    trained, everything = (sum(p.numel() for p in ps) for ps in ((p for _, p in tuner.named_parameters()), model.parameters()))
    ready = time.perf_counter() - began
    print(f"trained: {trained:,} of {everything:,} parameters ({trained / everything:.2%}); model ready in {ready:.1f} s")
    checkpointed = build.checkpointing(options, model, loss, [samples[i] for i in plan.largest_pass()], trained, ranks)
    build.compiling(options, model, device, checkpointed, ranks)
    build.sharding(options, loss, device, everything)
    longest = min(positions, options.max_new_tokens + max((len(question.prompt) for question in questions), default=0))
    ask = answers.Answers(model, tuner, model_dir, tokenizer, template.stop_ids, options.max_new_tokens, longest, device)
    generate = answers.score(ask, questions, ranks) if options.predict_with_generate else None
    shown = answers.Samples.chosen(options, ask, questions) if ranks.first and not sharded and not options.torch_compile else None
    if shown is not None and not resumed:
        shown.start()

    from swiftlite.train import checkpoint, folder
    from swiftlite.train.log import Logbook, Silent

    in_place = resumed is not None and not options.given("output_dir")
    run = resumed.parent if resumed and in_place else None
    if run is None:
        run = ranks.agree(folder.create(options.output_dir, _run_name(options), options.add_version) if ranks.first else Path())
    peak = options.learning_rate if options.learning_rate is not None else (1e-5 if full else 1e-4)
    args = _args(options, model_dir, dtype, {"learning_rate": peak, "max_length": max_length, "total_steps": total})
    warmup = options.warmup_steps if options.warmup_steps > 0 else math.ceil(options.warmup_ratio * total)
    schedule = Schedule(
        peak, options.lr_scheduler_type, min(warmup, total), total, options.min_lr_rate, options.wsd_decay_ratio
    )  # fmt: skip
    print(
        f"{total} steps; learning rate {peak:g}{'' if options.learning_rate is not None else f' (default for {options.tuner_type})'}, "
        f"{schedule.kind} after {schedule.warmup} warm-up steps; {len(evaluation)} rows for evaluation\nrun: {run}"
    )
    if ranks.first:
        checkpoint.clean(run)
        folder.begin(run, args)

    def collect() -> tuple[Callable[[Path], None], dict[str, Any]]:
        weights = build.weights(tuner, loss, ranks, sharded)

        def write(directory: Path) -> None:
            if full:
                tuner.save(directory, str(model_dir), template.stop_ids, weights)
            else:
                tuner.save(directory, str(model_dir), weights)
                write_generation_config(directory, model_dir, template.stop_ids)
            template.save(directory)
            folder.write_args(directory, args)

        return write, {"masters": tuner.masters(weights) if ranks.first else {}}

    save_steps = options.save_steps
    settings = LoopSettings(
        OptimizerSettings(
            options.optim, options.weight_decay, (options.adam_beta1, options.adam_beta2), options.adam_epsilon,
            options.lorap_lr_ratio or 1.0,
        ),
        options.max_grad_norm, options.logging_steps, options.eval_steps or save_steps, save_steps, options.save_total_limit or 2,
        options.save_only_model, options.early_stop_interval, options.create_checkpoint_symlink,
        f"eval_{options.metric_for_best_model or ('rouge-l' if generate else 'loss')}",
    )  # fmt: skip
    history = state.get("log_history", [])
    with contextlib.closing(Logbook(run, total, history, options.report_to) if ranks.first else Silent(total, history)) as logbook:
        trainer = Trainer(
            model, tuner, loss, plan, schedule, samples, evaluation, 1 if alone else options.per_device_eval_batch_size, settings, run,
            logbook, collect, {"fingerprint": rows.fingerprint, "data": rows.table(), "processes": planned_for}, ranks, generate, sharded,
            push.send if push is not None and options.hub_strategy == "every_save" else None,
        )  # fmt: skip
        torch.manual_seed(options.seed + 1 + ranks.rank)  # dropout differs between processes
        if resumed and tensors is not None:
            trainer.restore(state, tensors, resumed)
            plan.resume(state)
            print(f"resumed at step {trainer.progress.step} of {total}")
        ended = trainer.run()
        info = _info(trainer, run, ended, device)
        logbook.final({key: value for key, value in info.items() if key != "interrupted"})
        logged = logbook.rows
    if not ranks.first:
        return info
    from swiftlite.train.plots import draw
    from swiftlite.train.report import write_report

    draw(logged, run / "images")
    told = shown.finish() if shown is not None and ended is None else []
    write_report(run, logged, options, args, rows.table(), samples[0], tokenizer, info, told)
    _goodbye(info, options)
    if push is not None:
        push.finish(info["best_model_checkpoint"] or info["last_model_checkpoint"])
    return info


# -- before the model is loaded -----------------------------------------------------------------------------------------


def _dtype_name(config: Any) -> str | None:
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")


def _run_name(options: Options) -> str:
    if options.model_type:
        return options.model_type
    return Path(options.model).resolve().name if os.path.isdir(options.model) else options.model.rsplit("/", 1)[-1]


def _args(options: Options, model_dir: Path, dtype: Any, decided: dict[str, Any]) -> dict[str, Any]:
    """What `sft_args.json` says: every flag, and what became of those that were left to us."""
    args = as_json(options)
    if options.model and os.path.isdir(options.model):
        args["model"] = str(Path(options.model).resolve())
    return {
        **args,
        "model_dir": str(model_dir.resolve()),
        "resolved": {"torch_dtype": str(dtype).removeprefix("torch."), **decided},
        "origins": {name: origin for name, origin in options.origins.items() if origin != "default"},
        "swiftlite_version": __version__,
    }


# -- rows --------------------------------------------------------------------------------------------------------------


def _max_length(options: Options, config: Any) -> int:
    limit = config.get_text_config().max_position_embeddings
    if options.max_length is None:
        return min(2048, limit)
    if options.max_length > limit:
        print(f"note: --max_length {options.max_length} is more than the model's {limit} positions; using {limit}")
    return min(options.max_length, limit)


# -- after -------------------------------------------------------------------------------------------------------------


def _info(trainer: Any, run: Path, ended: signal.Signals | None, device: Any) -> dict[str, Any]:
    from swiftlite.train import memory

    progress = trainer.progress
    best = progress.best_model_checkpoint
    return {
        "last_model_checkpoint": progress.last_model_checkpoint,
        "best_model_checkpoint": best if best and os.path.isdir(best) else None,
        "best_metric": progress.best_metric,
        "metric": trainer.settings.best_metric,
        "global_step": progress.step,
        "train_time_s": round(progress.seconds, 2),
        "tokens": progress.tokens,
        "memory_gb": memory.peak(device),
        "run_dir": str(run),
        "interrupted": None if ended is None else int(ended),
    }


def _goodbye(info: dict[str, Any], options: Options) -> None:
    last = info["last_model_checkpoint"]
    if info["interrupted"] is not None:
        print(
            f"stopped at step {info['global_step']}; go on with:\n  swift sft --resume_from_checkpoint {last}"
            if last
            else "stopped before the first step was done; nothing was saved"
        )
        return
    print(f"done in {info['train_time_s']:.1f} s, peak memory {info['memory_gb']:.1f} GB")
    print(f"last_model_checkpoint: {last}")
    print(f"best_model_checkpoint: {info['best_model_checkpoint'] or '(no evaluation rows)'}")
    print(f"try it:\n  swift infer --ckpt_dir {info['best_model_checkpoint'] or last}")
