"""A model directory in the Hugging Face layout -> a stock transformers model and its tokenizer.

Every failure that a user can cause (no config, no or incomplete weights, an architecture that this transformers does not know,
remote code) becomes a ModelError that says what to do; weights that are silently missing never become random numbers.
This module does not know about the engine, adapters or templates.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftlite.errors import ModelError
from swiftlite.later import compiler_later

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


_before: list[tuple[int, bool]] = []  # what transformers showed before the first of the loads that run now, once for each of them
_changing = threading.Lock()
_making = threading.Lock()  # of one model at a time: transformers sets the dtype of the whole process for it


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars while a model is read; our own messages say what matters.

    Several threads may load at one time: the first silences, the last gives back what was.
    """
    from transformers.utils import logging

    with _changing:
        _before.append(_before[0] if _before else (logging.get_verbosity(), logging.is_progress_bar_enabled()))
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        with _changing:
            level, bar = _before.pop()
            if not _before:
                logging.set_verbosity(level)
                if bar:
                    logging.enable_progress_bar()


def load_config(path: str | Path) -> PreTrainedConfig:
    """The model's configuration. ModelError when there is none, it is broken, or its architecture is unknown or not stock."""
    directory = Path(path)
    file = directory / "config.json"
    if not directory.is_dir():
        raise ModelError(f"There is no model directory {directory}.", fix="give the path of a directory with config.json and weights")
    if not file.is_file():
        hint = "this is an adapter: give its base model as the model" if (directory / "adapter_config.json").is_file() else ""
        raise ModelError(
            f"{directory} is not a model.", "it has no config.json", hint or "give a model directory in the Hugging Face layout"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{file} cannot be read.", f"{type(error).__name__}: {error}", "download or export the model again") from error

    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    if model_type not in CONFIG_MAPPING:
        why = "its code ships with the model (auto_map), which is never run here" if "auto_map" in raw else f"transformers {__version__}"
        raise ModelError(f"The architecture {model_type!r} of {directory} is not supported.", why, "use a model of a stock architecture")
    try:
        with quiet():
            return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{file} does not describe a valid {model_type} model.", str(error).split("\n")[0]) from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The model's tokenizer. ModelError when the files are missing or broken."""
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"There is no model directory {directory}.", fix="give the path of a directory with tokenizer.json")
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            return tokenizer
    except Exception as error:
        present = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"))
        why = str(error).split("\n")[0] if present else "it has no tokenizer.json"
        raise ModelError(f"The tokenizer of {directory} cannot be loaded.", why, "copy the tokenizer's files into the directory") from error


def check_weights(directory: Path) -> None:
    """ModelError unless every weight file that the directory promises is there."""
    found = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if found is None:
        raise ModelError(f"{directory} has no weights.", f"none of {', '.join(WEIGHTS)} is there", "download or export the model again")
    if found.name.endswith(".index.json"):
        try:
            shards = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{found} cannot be read.", f"{type(error).__name__}: {error}", "download the model again") from error
        missing = [name for name in shards if not (directory / name).is_file()]
        if missing:
            raise ModelError(
                f"{directory} is incomplete.", f"{len(missing)} of {len(shards)} weight files are missing, first {missing[0]}",
                "download the model again",
            )  # fmt: skip


def load_model(path: str | Path, dtype: torch.dtype, device: torch.device, attention: str, **kwargs: Any) -> PreTrainedModel:
    """The causal language model in `path`, in eval mode without gradients' overhead decided by the caller.

    `attention` is the name of an attention function registered with transformers (`sdpa`, `swift_pages`, ...); `kwargs` go to
    `from_pretrained`. Quantized checkpoints (compressed-tensors) load through transformers' own reader, which unpacks them into
    `dtype`, so that every linear is a plain one.
    Raises ModelError when the directory is broken, weights are missing or the architecture has no causal LM.
    """
    directory = Path(path)
    config = load_config(directory)
    check_weights(directory)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{directory} ({config.model_type}) is not a causal language model.", fix="give a text generation model")
    quantization = config.to_dict().get("quantization_config") or {}
    if quantization.get("quant_method") == "compressed-tensors":
        config.quantization_config = {**quantization, "dequantize": True}
    try:
        with _making, quiet(), compiler_later():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, device_map=None if device.type == "cpu" else {"": device},
                attn_implementation=attention, trust_remote_code=False, local_files_only=True, output_loading_info=True, **kwargs,
            )  # fmt: skip
        model, report = loaded
    except ModelError:
        raise
    except KeyError as error:
        if error.args != (attention,):
            raise ModelError(
                f"The weights of {directory} cannot be loaded.", _reason(error), "download or export the model again"
            ) from error
        why = f"{config.model_type} has its own attention code, outside transformers' attention interface"
        raise ModelError(f"{directory} cannot run with attention {attention!r}.", why, "serve it with --infer_backend vllm") from error
    except (ImportError, OSError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise ModelError(f"The weights of {directory} cannot be loaded.", _reason(error), "download or export the model again") from error
    except Exception as error:  # safetensors raises its own class for a truncated or foreign file
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelError(f"The weights of {directory} cannot be read.", str(error), "download or export the model again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{directory} lacks weights of its own architecture ({config.model_type}).",
            f"{len(missing)} tensors are missing, first {missing[0]}", "download or export the model again",
        )  # fmt: skip
    return model.eval()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]
