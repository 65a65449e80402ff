"""The quick start changes when things are imported, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swiftlite import startup

START = """
import gc, sys, threading
if "off" in sys.argv:
    gc.disable()
from swiftlite import LLM, SamplingParams, startup
print("torch" in sys.modules, end=" ")
startup.begin()
import torch
print("collecting", gc.isenabled(), "frozen", gc.get_freeze_count() > 10000, "threads", threading.active_count(), torch.ones(2).sum())
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [("on", "False collecting True frozen True threads 1 tensor(2.)"), ("off", "False collecting False frozen False threads 1 tensor(2.)")],
)
def test_importing_leaves_the_collector_as_it_was_and_no_thread(given: str, said: str) -> None:
    """And nothing is complained about at the exit, as extension modules do when what was frozen is never collected."""
    done = subprocess.run([sys.executable, "-c", START, given], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == said and done.stderr == ""


RENAMED = """
from swiftlite import startup
startup.begin()
import warnings
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
model.gradient_checkpointing_enable()
warnings.warn("of the user's own code", FutureWarning)
"""


def test_only_users_own_deprecations_are_said() -> None:
    """transformers 5.24 renames what 5.16 calls otherwise: nothing that a user could do anything about."""
    done = subprocess.run([sys.executable, "-c", RENAMED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("Warning") == 1 and "of the user's own code" in done.stderr, done.stderr


def test_what_cannot_be_read_ahead_is_left_to_who_needs_it(tmp_path: Path) -> None:
    startup._read_ahead(tmp_path / "missing")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    startup._read_ahead(tmp_path)


MODELS = """
import sys
import transformers
from swiftlite import startup
if "own" not in sys.argv:
    startup._import_models()
    from transformers.utils import import_utils
    assert import_utils.define_import_structure.__module__ == import_utils.__name__
import transformers.models as models
from transformers.models.qwen3 import Qwen3Config
print(sorted((name, sorted(map(str, names))) for name, names in models._import_structure.items()), Qwen3Config)
"""


def test_models_are_listed_once_and_the_list_is_transformers_own() -> None:
    own, ours = (
        subprocess.run([sys.executable, "-c", MODELS, how], capture_output=True, text=True, timeout=120, check=True).stdout
        for how in ("own", "ours")
    )
    assert "qwen3" in own and ours == own


LIGHT = """
import sys
from swiftlite import cli, startup
startup.begin = lambda *_, **__: sys.exit("begun with " + str(sorted({"torch", "transformers", "numpy", "jinja2"} & set(sys.modules))))
cli.main(["sft", "--model", "tiny-chat", "--dataset", "tiny-chat"])
"""


def test_flags_are_checked_before_anything_heavy_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "begun with []"


COMPILER = """
import importlib, sys
from swiftlite import startup
startup.begin(alone="alone" in sys.argv)
from swiftlite import LLM, SamplingParams
before = LLM(sys.argv[1], device="cpu").generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
heavy = [name for name in ("torch._dynamo", "torch.distributed.tensor") if name in sys.modules]
print("imported:", *heavy)
how = sys.argv[2]
import torch
if how == "part":  # a part of it first: the whole is imported, and each part once
    import torch._dynamo.config as config
    assert config is torch._dynamo.config is sys.modules["torch._dynamo.config"]
elif how == "inside":  # asked for while the stand-in is there
    from swiftlite.later import compiler_later
    with compiler_later():
        import torch._dynamo.config as config
        assert config is sys.modules["torch._dynamo"].config and config.suppress_errors in (True, False)
elif how == "attribute":
    from swiftlite.later import compiler_later
    with compiler_later():
        import torch._dynamo
        assert torch._dynamo.list_backends()
compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")
assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
import torch._dynamo as real
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import masking_utils
from transformers.integrations.flex_attention import WrappedFlexAttention
assert masking_utils.TransformGetItemToIndex is TransformGetItemToIndex
assert real.__spec__.origin == real.__file__ and torch._dynamo is real
marked = WrappedFlexAttention.__init__.__closure__
assert any("_torchdynamo_disable" in vars(cell.cell_contents[0]) for cell in marked if isinstance(cell.cell_contents, list)), marked
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "swiftlite.later"]
with TransformGetItemToIndex():
    pass
"""


@pytest.mark.parametrize("how", ["whole", "part", "inside", "attribute"])
def test_the_compiler_comes_when_it_is_asked_for(how: str, make_model: Callable[..., Path]) -> None:
    """Then it is whole, and has what was marked for it before it came."""
    done = subprocess.run([sys.executable, "-c", COMPILER, make_model("qwen3"), how], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "imported: torch.distributed.tensor\n" in done.stdout


KEPT = """
import importlib.util, sys
from swiftlite import startup
startup.begin()
import torch
from swiftlite.later import compiler_later
with compiler_later():
    import torch._dynamo as kept
    from torch._dynamo import allow_in_graph, disable
    assert importlib.util.find_spec("torch._dynamo").origin == kept.__file__
    assert sys.modules["torch._dynamo"] is kept and type(kept).__name__ == "_StandIn"
    import torch._dynamo.config as config  # a part of it: run once, though the stand-in was its parent until now
from torch._dynamo import convert_frame
assert convert_frame.config is config is torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert config.__spec__.origin.endswith("config.py")
late = [disable(lambda x: x + 1), kept.disable(lambda x: x + 1), disable(recursive=False)(lambda x: x + 1)]
assert all(one._torchdynamo_disable for one in late)
class Layer(torch.nn.Module):
    pass
assert disable(Layer) is Layer
"""


def test_what_was_taken_from_the_stand_in_is_the_compilers_own_later() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


MASKS = """
from swiftlite import startup
startup.begin()
from swiftlite.later import compiler_later
from transformers import masking_utils
with compiler_later():
    with masking_utils.TransformGetItemToIndex():
        pass
"""


def test_what_masks_take_of_the_compiler_works_while_the_stand_in_is_there() -> None:
    done = subprocess.run([sys.executable, "-c", MASKS], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_of_two_loads_at_one_time_the_last_gives_back_what_was() -> None:
    from transformers.utils import logging

    from swiftlite.models.loading import quiet

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    try:
        first, second = quiet(), quiet()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
        second.__exit__(None, None, None)
        assert logging.get_verbosity() == logging.WARNING and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


def test_models_of_two_dtypes_may_load_at_one_time(make_model: Callable[..., Path]) -> None:
    """transformers makes a model with the dtype of the whole process set to its own."""
    import torch

    from swiftlite.models.loading import load_model

    path, dtypes = make_model("qwen3"), [torch.float32, torch.bfloat16] * 8
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda dtype: load_model(path, dtype, torch.device("cpu"), "sdpa"), dtypes))
    assert [{parameter.dtype for parameter in model.parameters()} for model in models] == [{dtype} for dtype in dtypes]


def test_a_process_of_ours_has_no_distributed_tensors(make_model: Callable[..., Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILER, make_model("llama"), "whole", "alone"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "imported:\n" in done.stdout
