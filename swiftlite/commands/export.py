"""`swift export`: merge an adapter into its base, convert it to PEFT's format, quantize a model; any of them in one command.

Results lie beside the checkpoint under SWIFT's names: `<ckpt>-merged`, `<ckpt>-peft`, `<ckpt>[-merged]-<method>-int<bits>`;
a base model's quantized copy lies in the working directory. Each result appears whole or not at all.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swiftlite.errors import AdapterError, CheckpointError, HubError, SwiftError, UsageError
from swiftlite.hub import resolve_model
from swiftlite.options.parse import Options
from swiftlite.options.resolve import inherit

USAGE = (
    "one of: --ckpt_dir CKPT --merge_lora true | --ckpt_dir CKPT --to_peft_format true | "
    "--ckpt_dir CKPT [--merge_lora true] --quant_bits 4 | --model MODEL --quant_bits 8"
)


def main(options: Options) -> int:
    """Does what is asked, in the order convert, merge, quantize; prints each result's path."""
    if not (options.merge_lora or options.to_peft_format or options.quant_bits):
        raise UsageError("swift export: nothing to do", "neither --merge_lora, --to_peft_format nor --quant_bits is given", USAGE)
    method = _method(options)
    checkpoint = _checkpoint(options)
    results = options.to_peft_format + (options.merge_lora and not options.quant_bits) + bool(options.quant_bits)
    if options.export_dir and results > 1:
        raise UsageError("--export_dir names one result, and this command makes several", fix="run them one by one, or leave it out")
    told = options.given("model")
    if checkpoint is not None:
        for line in inherit(options, checkpoint):
            print(line)
    if options.to_peft_format:
        _to_peft(options, _adapter(checkpoint, "--to_peft_format"))
    model = None
    if options.merge_lora:
        model = _merge(options, _adapter(checkpoint, "--merge_lora"), told)
    if options.quant_bits:
        _quantize(options, method, checkpoint, model)
    return 0


def _method(options: Options) -> str:
    """The quantization that is used; SwiftError for one that is not built."""
    if not options.quant_bits:
        return options.quant_method
    if options.quant_bits not in (4, 8):
        raise UsageError(f"--quant_bits {options.quant_bits} is not possible", "int8 and int4 are", "pass --quant_bits 8 or 4")
    if options.quant_method == "awq":
        if options.given("quant_method"):
            raise SwiftError(
                "--quant_method awq is not built yet",
                "only round-to-nearest is, which needs no calibration data",
                "pass --quant_method rtn",
            )
        print("quantizing with rtn (round to nearest): awq, SWIFT's default method, is not built yet")
    return "rtn"


def _checkpoint(options: Options) -> Path | None:
    """--ckpt_dir, or the one of --adapters."""
    written = [options.ckpt_dir] if options.ckpt_dir else []
    written += [item if Path(item).is_dir() else item.partition("=")[2] or item for item in options.adapters]
    if not written:
        return None
    if len(written) > 1:
        raise UsageError("swift export takes one checkpoint", f"{len(written)} are given", "run it once for each")
    path = Path(os.path.abspath(Path(written[0]).expanduser()))
    if not path.is_dir():
        raise CheckpointError(
            f"no checkpoint at {written[0]}", "there is no such directory", "pass a checkpoint-<step> folder of `swift sft`"
        )
    return path


def _is_full_model(checkpoint: Path) -> bool:
    return (checkpoint / "config.json").is_file() and not (checkpoint / "adapter_config.json").is_file()


def _adapter(checkpoint: Path | None, flag: str) -> Path:
    """The checkpoint, which must hold an adapter."""
    if checkpoint is None:
        raise UsageError(f"{flag} needs a checkpoint", fix="pass --ckpt_dir, a checkpoint-<step> folder of `swift sft`")
    if _is_full_model(checkpoint):
        raise CheckpointError(f"{checkpoint} is a full model", f"there is no adapter for {flag}", "use it as it is")
    return checkpoint


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _to_peft(options: Options, checkpoint: Path) -> None:
    from swiftlite.adapters.convert import to_peft

    out = to_peft(checkpoint, options.export_dir or _beside(checkpoint, "-peft"), exist_ok=options.exist_ok)
    print(f"PEFT adapter: {out}")


@contextmanager
def _peft_form(checkpoint: Path) -> Iterator[Path]:
    """The checkpoint as a PEFT directory: itself, or a temporary copy of SWIFT's own layout or of pickled weights."""
    from swiftlite.adapters.convert import to_peft
    from swiftlite.adapters.files import CONFIG, WEIGHTS

    if (checkpoint / CONFIG).is_file() and (checkpoint / WEIGHTS).is_file():
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        yield to_peft(checkpoint, Path(folder) / checkpoint.name)


def _merge(options: Options, checkpoint: Path, told: bool) -> Path:
    from swiftlite.adapters.merge import merge

    final = not options.quant_bits
    out = Path(options.export_dir) if options.export_dir and final else _beside(checkpoint, "-merged")
    if out.is_dir() and not final and not options.exist_ok:
        print(f"{out} is there already: used as it is (--exist_ok true merges again)")
        return out
    started = time.monotonic()
    with _peft_form(checkpoint) as adapter:
        merge(_base(options, adapter, told), adapter, out, exist_ok=options.exist_ok)
    print(f"merged in {time.monotonic() - started:.1f} s")
    return out


def _base(options: Options, adapter: Path, told: bool) -> Path:
    """The base model: as told, else the first that is found of what the run's settings and the adapter itself name."""
    from swiftlite.adapters.config import read_config

    if told:
        return resolve_model(options.model, options.model_revision, options.use_hf)
    named = read_config(adapter)[0].base_model
    candidates = [name for name in dict.fromkeys((options.model, options.model_type, named)) if name]
    tried: list[HubError] = []
    for name in candidates:
        try:
            base = resolve_model(name, options.model_revision, options.use_hf)
        except HubError as error:
            tried.append(error)
            continue
        print(f"base model: {base}")
        return base
    if tried:
        why = "; ".join(error.what for error in tried)
        raise AdapterError(f"the base model of {adapter} is not found", why, "pass it: --model DIRECTORY")
    raise AdapterError(f"{adapter} does not say which base model it was made for", fix="pass it: --model DIRECTORY")


def _quantize(options: Options, method: str, checkpoint: Path | None, merged: Path | None) -> None:
    from swiftlite.quantize.rtn import quantize

    suffix = f"-{method}-int{options.quant_bits}"
    if merged is not None:
        source, out = merged, _beside(merged, suffix)
    elif checkpoint is not None:
        if not _is_full_model(checkpoint):
            raise UsageError(f"{checkpoint} is an adapter", "only a whole model can be quantized", "add --merge_lora true")
        source, out = checkpoint, _beside(checkpoint, suffix)
    else:
        name = options.model or options.model_type
        if not name:
            raise UsageError("--quant_bits needs a model", fix="pass --model, or --ckpt_dir with --merge_lora true")
        source = resolve_model(name, options.model_revision, options.use_hf)
        short = options.model_type or (source.resolve().name if Path(name).exists() else name.rstrip("/").rsplit("/", 1)[-1])
        out = Path.cwd() / (short + suffix)
    started = time.monotonic()
    quantize(
        source,
        options.export_dir or out,
        options.quant_bits,
        options.group_size,
        group_size_given=options.given("group_size"),
        exist_ok=options.exist_ok,
    )
    print(f"quantized in {time.monotonic() - started:.1f} s")
