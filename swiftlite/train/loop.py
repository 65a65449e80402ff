"""The training loop: forward, backward, step; log, evaluate, save.

The gradient of a step is that of (sum of token NLL) / (number of targets of the whole step), whatever the rows' grouping.
Several processes share a step's forward passes; all else each does alike, so weights, counts and decisions are the same in
all of them, and the first writes. Between log steps nothing is read back from the device. The loop's place is one integer,
the number of steps done; with the weights, the optimizer's state and the random state it determines everything that follows
(on a CPU: bit for bit).

Does not know data formats, templates, adapters' files: it gets encoded rows, a tuner and a `save` function.
"""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from swiftlite.errors import CheckpointError, TrainError
from swiftlite.train import checkpoint, gradients, memory
from swiftlite.train.batches import Sample, collate
from swiftlite.train.evaluation import Evaluation, Generate
from swiftlite.train.interrupt import Interrupt
from swiftlite.train.log import Logbook
from swiftlite.train.loss import TargetLoss
from swiftlite.train.optimizers import OptimizerSettings, build
from swiftlite.train.plan import Plan, Schedule
from swiftlite.train.progress import Progress
from swiftlite.train.ranks import Ranks
from swiftlite.train.streaming import StreamPlan

SIGNALS = (signal.SIGINT, signal.SIGTERM)


Collect = Callable[[], tuple[Callable[[Path], None], dict[str, Any]]]  # -> (writes the weights into a folder, more tensors)


class Tuner(Protocol):
    """What is trained: Lora or Full."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True)
class LoopSettings:
    """The loop's own numbers; steps count optimizer steps."""

    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    max_grad_norm: float = 1.0
    logging_steps: int = 5
    eval_steps: int = 50
    save_steps: int = 50
    save_total_limit: int = 2
    save_only_model: bool = False
    patience: int | None = None  # evaluations without a new best that end the run
    symlinks: bool = False
    best_metric: str = "eval_loss"  # of an evaluation's row; lower is better for eval_loss, higher for every other


class Trainer:
    """Everything a run needs, made ready by the caller; `run()` does it."""

    def __init__(
        self,
        model: nn.Module,
        tuner: Tuner,
        loss: TargetLoss,
        plan: Plan | StreamPlan,
        schedule: Schedule,
        samples: Sequence[Sample],
        evaluation: Sequence[Sample],
        eval_rows: int,
        settings: LoopSettings,
        folder: Path,
        logbook: Logbook,
        collect: Collect,
        extra_state: dict[str, Any],
        ranks: Ranks = Ranks(),
        generate: Generate | None = None,
        sharded: bool = False,
        saved: Callable[[Path], None] | None = None,
    ) -> None:
        """`collect`: what a checkpoint holds, asked of every process; the first one writes it. `sharded`: by --fsdp.

        `evaluation`, `eval_rows`, `generate`: see Evaluation. `saved` gets every checkpoint that is on disk.
        """
        self.ranks, self.sharded, self.saved = ranks, sharded, saved
        self.model, self.tuner, self.loss, self.plan, self.schedule = model, tuner, loss, plan, schedule
        self.samples, self.settings = samples, settings
        self.evaluation = Evaluation(evaluation, eval_rows, plan.packing, loss, ranks, sharded, generate)
        self.folder, self.logbook, self.collect, self.extra_state = folder, logbook, collect, extra_state
        self.device = loss.device
        self.named = list(tuner.named_parameters())
        self.parameters = [parameter for _, parameter in self.named]
        self.used = self.parameters  # those that get gradients; known after the first step
        self.heard: signal.Signals | None = None
        self.progress = Progress()
        self._reset_window()
        self.optimizer = build(self.named, schedule.peak, settings.optimizer, model)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _random_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        return state | {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else state

    def _set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def restore(self, state: dict[str, Any], tensors: dict[str, Any], path: Path) -> None:
        """Stand where the checkpoint at `path` stood; the weights are the caller's. CheckpointError when it trained other
        parameters."""
        if tensors["names"] != [name for name, _ in self.named]:  # the optimizer's state goes by position
            raise CheckpointError("cannot resume: the checkpoint trained other parameters than this run would", "the model differs")
        self.progress = self.ranks.agree(Progress.resumed(state, path, self.folder))
        state_dict = tensors["optimizer"]
        if self.sharded:
            from swiftlite.train.shard import share_state

            state_dict = share_state(self.optimizer, state_dict)
        self.optimizer.load_state_dict(state_dict)
        if self.ranks.rank < len(tensors["random"]):  # else there were fewer processes
            self._set_random_state(tensors["random"][self.ranks.rank])
        window = tensors["window"]
        self.nll, self.hits = window["nll"].to(self.device), window["hits"].to(self.device)
        self.targets, self.tokens = window["targets"], window["tokens"]

    def save(self) -> Path:
        """Write checkpoint-<step> and delete what of this run --save_total_limit no longer keeps."""
        started = time.perf_counter()
        settings = self.settings
        content = None
        random = self.ranks.gather(self._random_state())
        write, more = self.collect()
        optimizer = None if settings.save_only_model else self._optimizer_state()
        final = self._place()
        self.progress.wrote(final)
        if not self.ranks.first:
            return final
        if optimizer is not None:
            window = {"nll": self.nll, "hits": self.hits, "targets": self.targets, "tokens": self.tokens}
            content = {
                "names": [name for name, _ in self.named],
                "optimizer": optimizer,
                "random": random,
                "window": window,
                **more,
            }
        state = {
            **self.extra_state, **self.plan.state(),
            "global_step": self.progress.step, "epoch": self._epoch(),
            "total_steps": self.schedule.total,
            "progress": vars(self.progress), "log_history": self.logbook.rows,
        }  # fmt: skip
        checkpoint.write(self.folder, self.progress.step, state, content, write)
        best = self.progress.best_model_checkpoint
        self.progress.kept = checkpoint.rotate(self.folder, self.progress.kept, settings.save_total_limit, best)
        if settings.symlinks:
            checkpoint.link(self.folder, "last", final)
            if best is not None:
                checkpoint.link(self.folder, "best", Path(best))
        self.logbook.say(f"saved {final} ({time.perf_counter() - started:.1f} s)")
        if self.saved is not None:
            self.saved(final)
        return final

    def _place(self) -> Path:
        """Where the checkpoint of the step that was just done belongs."""
        return self.folder / f"checkpoint-{self.progress.step}"

    def _optimizer_state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        if not self.sharded:
            return state
        from swiftlite.train.shard import gather_state

        whole: dict[str, Any] = gather_state(state, self.ranks.first)
        return whole

    def _epoch(self) -> float:
        return round(self.progress.step / self.plan.steps_per_epoch, 4)

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self) -> signal.Signals | None:
        """Train to the end; returns the signal that ended it early, after saving.

        TrainError when the loss is no number or nothing gets a gradient; CheckpointError when a checkpoint cannot be written.
        """
        total, settings = self.schedule.total, self.settings
        self.model.train()
        gc.collect()
        if self.device.type == "cpu":
            memory.keep_freed()
        gc.freeze()  # the model and the rows never become garbage: collections need not walk them
        first = self.progress.step
        began = self.row_time = time.perf_counter()
        seconds_before = self.progress.seconds
        try:
            with Interrupt() as stop:
                while self.progress.step < total:
                    random_state = self._random_state()
                    norm, rate = self._step(self.progress.step, check=self.progress.step == first, stop=stop)
                    if norm is None:
                        self._set_random_state(random_state)
                        break
                    self.progress.step = step = self.progress.step + 1
                    self.progress.seconds = seconds_before + time.perf_counter() - began
                    self.logbook.step(step)
                    if step == 1 or step % settings.logging_steps == 0 or step == total:
                        self._log(norm, rate, (time.perf_counter() - began) / (step - first) * (total - step))
                    better = False
                    if self.evaluation and (step % settings.eval_steps == 0 or step == total):
                        better = self._evaluate(stop)
                    enough = settings.patience is not None and self.progress.without_best >= settings.patience
                    if step % settings.save_steps == 0 or step == total or better or enough or self._stopping(stop):
                        self._check_finite(norm)
                        self.save()
                    if stopping := self._stopping(stop):
                        return stopping if step < total else None
                    if enough:
                        count = self.progress.without_best
                        self.logbook.say(f"stopping early: {count} evaluations without a better {settings.best_metric}")
                        return None
                saved = self.progress.last_model_checkpoint == str(self._place())
                if self._stopping(stop) and self.progress.step > 0 and not saved:
                    self.save()
                return self._stopping(stop)
        finally:
            gc.unfreeze()

    def _step(self, number: int, check: bool, stop: Interrupt) -> tuple[torch.Tensor | None, float]:
        """One optimizer step; (gradient norm, learning rate). (None, 0) when a signal came before the weights changed."""
        passes = self.plan.step(number)
        targets = sum(int(self.samples[i].mask[1:].sum()) for rows in passes for i in rows)  # of all processes
        mine = self.ranks.share(passes, even=self.sharded)
        batches = [(collate([self.samples[i] for i in rows], self.device), counts) for rows, counts in mine]
        total_nll, total_hits = torch.zeros_like(self.nll), torch.zeros_like(self.hits)
        for batch, counts in batches:
            if stop.signal is not None and self.ranks.world == 1:
                self.optimizer.zero_grad(set_to_none=True)
                return None, 0.0
            nll, hits = self.loss(batch)
            if check and not nll.requires_grad:
                raise TrainError(
                    "nothing learns: the loss depends on no trained parameter", gradients.frozen(self.named), "check --target_modules"
                )
            (nll / targets if counts else 0 * nll).backward()
            if counts:
                total_nll += nll.detach()
                total_hits += hits
        if self.ranks.world > 1:
            self._share(total_nll, total_hits, stop, check)
        self.nll += total_nll
        self.hits += total_hits
        self.targets += targets
        self.tokens += sum(len(self.samples[i].ids) for rows in passes for i in rows)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.sharded:
            from swiftlite.train.shard import whole

            norm = whole(norm)
        if check:
            gradients.check(self.named, norm, self.sharded, self.logbook.say)
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.max_grad_norm, norm)
        rate = self.schedule(number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, rate

    def _share(self, nll: torch.Tensor, hits: torch.Tensor, stop: Interrupt, check: bool) -> None:
        """Sum the step's gradients and counts over the processes, and let all hear of a signal that one of them got.

        Sharded gradients are summed already, by the backward pass. A process without a pass in this step adds zeros. A
        parameter that no process uses keeps no gradient, as in one.
        """
        if check and not self.sharded:
            used = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.float32, device=self.device)
            self.ranks.sum([used])
            self.used = [p for p, yes in zip(self.parameters, used.tolist(), strict=True) if yes]
        shared = [] if self.sharded else self.used
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        told = torch.tensor([stop.signal == number for number in SIGNALS], dtype=torch.int64)  # on the host: no wait for a GPU
        self.ranks.sum([*(p.grad for p in shared if p.grad is not None), nll, hits])
        self.ranks.sum([told])
        self.heard = next((number for number, count in zip(SIGNALS, told.tolist(), strict=True) if count), None)

    def _stopping(self, stop: Interrupt) -> signal.Signals | None:
        """The signal that ends the run; several processes must all have heard of it."""
        return stop.signal if self.ranks.world == 1 else self.heard

    def _reset_window(self) -> None:
        """Start counting for the next log row."""
        self.nll = torch.zeros((), dtype=torch.float32, device=self.device)
        self.hits = torch.zeros((), dtype=torch.int64, device=self.device)
        self.targets = self.tokens = 0

    def _log(self, norm: torch.Tensor, rate: float, eta: float) -> None:
        self._check_finite(norm)
        loss, hits = self.nll.item() / self.targets, self.hits.item() / self.targets
        self.progress.tokens += self.tokens
        now = time.perf_counter()
        row = {
            "loss": loss, "learning_rate": rate, "grad_norm": norm.item(), "epoch": self._epoch(), "global_step": self.progress.step,
            "tokens_per_s": self.tokens / (now - self.row_time), "memory_gb": memory.peak(self.device), "token_acc": hits,
        }  # fmt: skip
        self.row_time = now
        self.logbook.train(row, eta)
        self._reset_window()

    def _evaluate(self, stop: Interrupt) -> bool:
        """Log an evaluation; True when it is the best so far. A signal cuts it short."""
        values = self.evaluation.values(lambda: stop.signal is not None)
        if values is None:
            return False
        self.logbook.evaluation({**values, "epoch": self._epoch(), "global_step": self.progress.step})
        self.row_time = time.perf_counter()
        metric = self.settings.best_metric
        if metric not in values:  # the rows could not be answered this time
            return False
        return self.progress.judge(values[metric], metric == "eval_loss", self._place())

    # -- checks --------------------------------------------------------------------------------------------------------

    def _check_finite(self, norm: torch.Tensor) -> None:
        if math.isfinite(self.nll.item()) and math.isfinite(norm.item()):
            return
        last = self.progress.last_model_checkpoint
        raise TrainError(
            f"the loss or its gradient is no longer a number (seen at step {self.progress.step}); training stopped",
            "the steps were too large for this arithmetic",
            "lower --learning_rate, or use --torch_dtype float32" + (f"; the last good checkpoint is {last}" if last else ""),
        )
