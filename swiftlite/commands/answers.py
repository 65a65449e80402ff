"""Answers of the model in training, by the serving engine: what is scored and shown is what a server would say.

The engine runs on a twin of the trained model: modules of its own (attention, hooks and mode are the engine's) around the very
same parameters, so a full model is served as it stands after each step and the frozen base of an adapter is in memory once. The
adapter goes the way of a deployment: written in PEFT's form into a temporary folder, then `add_adapter`. Where the trained
modules hide base weights (--modules_to_save, PEFT's own layers, a quantized base) the engine reads the base from disk instead.
An engine lives for one round of answers; its cache takes no memory while the model trains.

Here, not in `train`, because training and serving never import each other.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftlite.errors import DataError, ModelError, SwiftError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from swiftlite.options.parse import Options
    from swiftlite.train.generation import GenerationScore, Question
    from swiftlite.train.ranks import Ranks

ROWS_AT_ONCE = 32
TRAINED = "trained"
SAMPLES, SAMPLE_TOKENS = 4, 48  # of the report, where nobody asked for more
CHEAP, CHEAP_CUDA = 1.5e9, 16e9  # bytes of weights up to which the report's answers take seconds


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model around the same parameters: a copy of its modules, without plain adapters and hooks."""
    from swiftlite.models.fused import unfuse
    from swiftlite.train.lora import LoraLinear, _replace

    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    stock = copy.deepcopy(model, shared)
    for name, module in list(stock.named_modules()):
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if isinstance(module, LoraLinear):
            _replace(stock, name, module.base)
    unfuse(stock)
    return stock.eval()


@dataclass(frozen=True)
class Answers:
    """Asks the model in training. `tuner`: Lora, PeftLora or Full; `longest`: tokens of prompt and answer together."""

    model: PreTrainedModel
    tuner: Any
    model_dir: Path
    tokenizer: Any
    stop_ids: Sequence[int]
    max_new_tokens: int
    longest: int
    device: torch.device

    @property
    def full(self) -> bool:
        from swiftlite.train.full import Full

        return isinstance(self.tuner, Full)

    @property
    def shares(self) -> bool:
        """The engine needs no second copy of the weights."""
        from swiftlite.train.lora import Lora

        return self.full or (isinstance(self.tuner, Lora) and not self.tuner.copies)

    def __call__(
        self, prompts: Sequence[list[int]], stopped: Callable[[], bool], trained: Sequence[bool] | None = None
    ) -> list[str] | None:
        """Greedy answers in order; None when `stopped` said so. `trained` False for a prompt: the base answers it (adapters only).

        SwiftError for what the engine cannot run, or has no memory for. Nothing of the engine is left in memory, whatever happens.
        """
        import torch

        try:
            return self._ask(prompts, stopped, trained)
        except SwiftError as error:
            failed = type(error)(error.what, error.why, error.fix)  # another one: the first holds the frames that hold the engine
        except torch.OutOfMemoryError as error:
            fix = "leave out --predict_with_generate, or free memory"
            failed = ModelError("there is no memory to answer evaluation rows", str(error).splitlines()[0], fix)
        finally:
            gc.collect()  # the engine's parts know one another, so its cache would wait for some later collection
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        raise failed

    def _ask(self, prompts: Sequence[list[int]], stopped: Callable[[], bool], trained: Sequence[bool] | None) -> list[str] | None:
        from swiftlite.engine.config import EngineConfig
        from swiftlite.engine.engine import Engine
        from swiftlite.engine.request import SamplingParams
        from swiftlite.models.device import base_dtype

        config = EngineConfig(max_model_len=self.longest, max_num_seqs=min(ROWS_AT_ONCE, len(prompts)), enforce_eager=True)
        dtype = str(base_dtype(self.model)).removeprefix("torch.")
        model = twin(self.model) if self.shares else None
        params = SamplingParams(max_tokens=self.max_new_tokens, temperature=0, seed=0, stop_token_ids=list(self.stop_ids))
        with (
            tempfile.TemporaryDirectory(prefix="swiftlite-adapter-") as folder,
            Engine(self.model_dir, config, dtype=dtype, device=self.device, tokenizer=self.tokenizer, model=model) as engine,
        ):
            if not self.full:
                self.tuner.save(Path(folder), str(self.model_dir))
                engine.add_adapter(TRAINED, folder)
            flags = trained or [True] * len(prompts)
            streams = [
                engine.submit(prompt, params, adapter=TRAINED if flag and not self.full else None)
                for prompt, flag in zip(prompts, flags, strict=True)
            ]
            while not all(stream.finished for stream in streams):
                if stopped():
                    return None  # dropping the streams and the engine ends them
                time.sleep(0.005)
            outputs = [stream.result() for stream in streams]
        failed = next((output.error for output in outputs if output.error), None)
        if failed:
            raise ModelError("the engine failed while it answered evaluation rows", failed, "leave out --predict_with_generate")
        return [output.outputs[0].text for output in outputs]


def asked(options: Options, conversations: Sequence[Any], template: Any, positions: int) -> list[Question]:
    """The rows that --predict_with_generate answers, or that the report may show. DataError when it is asked for and there are none."""
    from swiftlite.train.generation import questions

    count = options.eval_limit if options.predict_with_generate else SAMPLES if options.sample_answers is None else options.sample_answers
    found = questions(conversations, template, count, positions) if count != 0 and template.has_chat else []
    if options.predict_with_generate and not found:
        raise DataError(
            "--predict_with_generate: there is no row to answer", f"{len(conversations)} rows are held out for evaluation",
            "pass --val_dataset FILE, or a larger --split_dataset_ratio; the rows must be conversations that end in an answer",
        )  # fmt: skip
    return found


def score(ask: Answers, rows: list[Question], ranks: Ranks) -> GenerationScore:
    """What evaluates by answering `rows`; tried once, so that a model which the engine cannot run is known before training."""
    from swiftlite.train.generation import GenerationScore

    replace(ask, max_new_tokens=1)([rows[0].prompt], lambda: False)
    how = "on the weights in training" if ask.shares else "the base is read a second time for it"
    print(f"evaluation answers {len(rows)} rows, up to {ask.max_new_tokens} tokens each ({how})")
    return GenerationScore(rows, ask, ranks)


@dataclass
class Samples:
    """The report's answers. The base's come with the trained ones where an adapter is trained, from `start` otherwise."""

    ask: Answers
    rows: list[Question]
    before: list[str] | None = None

    @staticmethod
    def chosen(options: Options, ask: Answers, rows: list[Question]) -> Samples | None:
        """None where there is nothing to show, or nobody asked and it would take long: --sample_answers' rule."""
        count = options.sample_answers
        if count is None:
            size = sum(p.numel() * p.element_size() for p in ask.model.parameters())
            count = SAMPLES if ask.shares and size <= (CHEAP_CUDA if ask.device.type == "cuda" else CHEAP) else 0
            ask = replace(ask, max_new_tokens=min(SAMPLE_TOKENS, ask.max_new_tokens))
        return Samples(ask, [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else rows) if count and rows else None

    def start(self) -> None:
        """Ask the model before it is trained, where that cannot be done later."""
        if self.ask.full:
            self.before = self._answers([False] * len(self.rows))

    def finish(self) -> list[dict[str, str]]:
        """[{question, before, after, reference}]; "before" is left out where it is not known (a resumed full run)."""
        count = len(self.rows)
        both = not self.ask.full
        answers = self._answers([True] * count + [False] * count * both)
        if answers is None:
            return []
        before = answers[count:] if both else self.before
        shown = [
            {"question": row.text, "after": answer, "reference": row.reference} for row, answer in zip(self.rows, answers, strict=False)
        ]
        return shown if before is None else [{**row, "before": text} for row, text in zip(shown, before, strict=True)]

    def _answers(self, trained: list[bool]) -> list[str] | None:
        prompts = [row.prompt for row in self.rows]
        try:
            return self.ask((prompts * 2)[: len(trained)], lambda: False, trained)
        except SwiftError as error:  # the run itself is none the worse
            print(f"note: no sample answers in the report: {error.what} {error.why}")
            return None
