"""`swift sft` through the real command: what it writes, that it learns, equal runs, resuming, stopping, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swiftlite import cli

PAIRS = [
    ("who are you?", "I am Xiao Huang, trained by ModelScope."),
    ("你是谁？", "我是小黄，由魔搭训练的助手。"),
    ("capital of France?", "The capital of France is Paris."),
    ("浙江的省会在哪？", "浙江的省会在杭州。"),
    ("Hello", "Hello, how are you?"),
]
ROW_KEYS = {"loss", "learning_rate", "grad_norm", "epoch", "global_step", "tokens_per_s", "memory_gb", "token_acc"}
QUIET = ["--report_to", "none", "--logging_steps", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{question} {i}"}, {"role": "assistant", "content": answer}]}
        for i in range(4)
        for question, answer in PAIRS
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    return make_model("qwen3", tie_word_embeddings=True)


@pytest.fixture
def sft(tmp_path, data, model):
    """sft(*flags) -> the run's folder."""

    def run(*flags: str, code: int = 0) -> Path:
        before = set(tmp_path.glob("out/*/v*"))
        given = [] if "--resume_from_checkpoint" in flags else ["--model", str(model), "--dataset", str(data), "--learning_rate", "1e-2"]
        output = [] if "--output_dir" in flags or "--resume_from_checkpoint" in flags else ["--output_dir", str(tmp_path / "out")]
        assert cli.main(["sft", *given, *output, *flags]) == code
        return next(iter(set(tmp_path.glob("out/*/v*")) - before), tmp_path)

    return run


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]


def training(run: Path) -> list[dict]:
    return [row for row in log(run) if "loss" in row]


def trajectory(run: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in training(run)]


def assert_close(a: list[tuple[float, float]], b: list[tuple[float, float]], tolerance: float = 1e-4) -> None:
    assert len(a) == len(b)
    for got, want in zip(a, b, strict=True):
        assert got == pytest.approx(want, rel=tolerance)


def test_lora_run(sft, model, capsys):
    run = sft("--num_train_epochs", "8", "--logging_steps", "2", "--eval_steps", "4", "--save_steps", "4", "--split_dataset_ratio", "0.1")
    printed = capsys.readouterr().out
    assert run.parent.name == model.name
    assert run.name.startswith("v0-")
    rows = log(run)
    assert all(set(row) == ROW_KEYS for row in rows if "loss" in row)
    assert [row["global_step"] for row in rows if "loss" in row] == [1, 2, 4, 6, 8, 10, 12, 14, 16]
    assert [row["global_step"] for row in rows if "eval_loss" in row] == [4, 8, 12, 16]
    assert all(set(row) == {"eval_loss", "eval_token_acc", "epoch", "global_step"} for row in rows if "eval_loss" in row)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] / 2
    assert rows[-1]["last_model_checkpoint"] == str(run / "checkpoint-16")
    assert rows[-1]["best_model_checkpoint"] == str(run / "checkpoint-16")
    assert sorted(p.name for p in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-16"]  # --save_total_limit 2
    checkpoint = run / "checkpoint-16"
    for name in (
        "adapter_config.json", "adapter_model.safetensors", "sft_args.json", "trainer_state.json", "swift_template.json", "tokenizer.json",
    ):  # fmt: skip
        assert (checkpoint / name).is_file(), name
    for name in ("train_loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_s"):
        assert (run / "images" / f"{name}.png").stat().st_size > 5000
    assert list((run / "runs").glob("events*"))
    args = json.loads((checkpoint / "sft_args.json").read_text())
    assert args["model"] == args["model_dir"] == str(model)
    assert args["tuner_type"] == "lora"
    assert args["resolved"]["torch_dtype"] == "float32"
    for text in ("packing: up to", "⟦", "trained: ", "gradient checkpointing: off", "swift infer --ckpt_dir", "kept"):
        assert text in printed


def test_full_run_gives_a_model_that_answers_and_stops(sft, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = sft("--tuner_type", "full", "--num_train_epochs", "30", "--packing", "--split_dataset_ratio", "0", *QUIET)
    rows = training(run)
    assert rows[-1]["loss"] < 0.1
    assert rows[-1]["token_acc"] > 0.99
    checkpoint = run / f"checkpoint-{rows[-1]['global_step']}"
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    assert loaded.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    for question, answer in PAIRS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question + " 2"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        out = loaded.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert out[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(out, skip_special_tokens=True) == answer
    assert not list(run.glob("runs/*"))


def test_batch_times_accumulation(sft):
    """The same 8 rows a step, however they are grouped: the same trajectory."""
    common = ["--packing", "false", "--max_steps", "4", "--tuner_type", "full", *QUIET]
    runs = [
        trajectory(sft("--per_device_train_batch_size", str(rows), "--gradient_accumulation_steps", str(8 // rows), *common))
        for rows in (1, 2, 8)
    ]
    assert len(runs[0]) == 4
    assert_close(runs[0], runs[1])
    assert_close(runs[0], runs[2])


def test_packing_and_checkpointing_change_nothing(sft):
    """Every step holds all rows, so packed and unpacked passes hold the same."""
    common = ["--gradient_accumulation_steps", "100", "--max_steps", "4", *QUIET]
    packed = trajectory(sft("--packing", "true", "--per_device_train_batch_size", "4", *common))
    plain = trajectory(sft("--packing", "false", *common))
    recomputed = trajectory(sft("--packing", "true", "--per_device_train_batch_size", "4", "--gradient_checkpointing", "true", *common))
    assert_close(packed, plain)
    assert_close(packed, recomputed)


@pytest.mark.parametrize(
    "tuner", [["--tuner_type", "lora", "--lora_dropout", "0.1"], ["--tuner_type", "full", "--torch_dtype", "bfloat16"]]
)
def test_resume_is_exact(sft, tuner, tmp_path):
    common = ["--max_steps", "9", "--save_steps", "4", "--logging_steps", "3", "--report_to", "none", "--per_device_train_batch_size", "2"]
    straight = sft(*common, "--gradient_accumulation_steps", "2", "--save_total_limit", "9", *tuner)
    broken = tmp_path / "broken"
    shutil.copytree(straight, broken)
    for gone in ("checkpoint-8", "checkpoint-9", "images"):
        shutil.rmtree(broken / gone)
    sft("--resume_from_checkpoint", str(broken / "checkpoint-4"))

    def essential(run: Path) -> list[dict]:
        return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "memory_gb")} for row in log(run)[:-1]]

    assert essential(broken) == essential(straight)
    weights = "adapter_model.safetensors" if tuner[1] == "lora" else "model.safetensors"
    a, b = load_file(straight / "checkpoint-9" / weights), load_file(broken / "checkpoint-9" / weights)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    if tuner[1] == "full":
        assert all(tensor.dtype == torch.bfloat16 for tensor in a.values())
        masters = [torch.load(run / "checkpoint-9" / "trainer_state.pt", weights_only=True)["masters"] for run in (straight, broken)]
        assert all(torch.equal(tensor, masters[1][name]) for name, tensor in masters[0].items())


def test_resume_refusals(sft, tmp_path, capsys, data):
    run = sft("--max_steps", "2", *QUIET)
    checkpoint = str(run / "checkpoint-2")

    def refused(*flags: str) -> str:
        sft("--resume_from_checkpoint", checkpoint, *flags, code=1)
        return capsys.readouterr().err

    assert "2 of 2 steps" in refused()
    assert "--learning_rate 0.5 (it was 0.01)" in refused("--learning_rate", "0.5", "--max_steps", "4")
    weights = Path(checkpoint, "adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors has 100 of" in refused("--max_steps", "4")
    checkpoint = str(run / "checkpoint-7")
    assert "checkpoint-2" in refused()


def test_resume_notices_other_data(sft, tmp_path, data, capsys):
    own = tmp_path / "own.jsonl"
    shutil.copy(data, own)
    run = sft("--dataset", str(own), "--max_steps", "2", *QUIET)
    own.write_text(own.read_text().replace("Paris", "Lyon"))
    sft("--resume_from_checkpoint", str(run / "checkpoint-2"), "--max_steps", "4", code=1)
    assert "rows differ" in capsys.readouterr().err


def test_adapters_continues_from_weights_only(sft, capsys):
    first = sft("--max_steps", "6", "--lora_rank", "4", *QUIET)
    second = sft("--adapters", str(first / "checkpoint-6"), "--max_steps", "2", *QUIET)
    assert training(second)[0]["loss"] < training(first)[0]["loss"] * 0.8
    assert training(second)[0]["global_step"] == 1
    config = json.loads((second / "checkpoint-2" / "adapter_config.json").read_text())
    assert config["r"] == 4  # the adapter's own, not the flag's default


def test_best_checkpoint_is_kept(sft):
    """A rate that destroys the model after a while: the best is not the last, and both are there."""
    flags = ["--max_steps", "6", "--save_steps", "1", "--warmup_steps", "6", "--learning_rate", "3", "--split_dataset_ratio", "0.2"]
    run = sft("--tuner_type", "full", *flags, *QUIET)
    evals = {row["global_step"]: row["eval_loss"] for row in log(run) if "eval_loss" in row}
    best = min(evals, key=evals.__getitem__)
    assert best < 6
    assert log(run)[-1]["best_model_checkpoint"] == str(run / f"checkpoint-{best}")
    assert {p.name for p in run.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-6"}


def command(model: Path, data: Path, out: Path, *flags: str) -> list[str]:
    return [
        sys.executable, "-m", "swiftlite.cli", "sft", "--model", str(model), "--dataset", str(data), "--output_dir", str(out),
        "--report_to", "none", "--logging_steps", "1", *flags,
    ]  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signals_save(number, code, tmp_path, model, data):
    process = subprocess.Popen(
        command(model, data, tmp_path, "--max_steps", "100000"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step") and "/100000" in line and not line.split("/")[0].endswith(" 1"):
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in rest
    resume = next(line.strip() for line in rest.splitlines() if line.strip().startswith("swift sft --resume_from_checkpoint"))
    checkpoint = Path(resume.split()[-1])
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert cli.main(["sft", *resume.split()[2:], "--max_steps", str(step + 2)]) == 0
    assert (checkpoint.parent / f"checkpoint-{step + 2}").is_dir()
    assert [row["global_step"] for row in training(checkpoint.parent)] == list(range(1, step + 3))


LIMITED = """
import resource, sys
from swiftlite import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # as on a full disk: writes fail beyond this
code = cli.main(sys.argv[1:])
print("HEAVY", [name for name in ("transformers.trainer", "datasets", "peft", "trl", "gradio", "fastapi") if name in sys.modules])
sys.exit(code)
"""


def test_full_disk_and_light_start(tmp_path, model, data):
    words = command(model, data, tmp_path, "--max_steps", "2", "--tuner_type", "full")[3:]
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "error: cannot write" in done.stderr
    assert "HEAVY []" in done.stdout  # seconds of start-up
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*checkpoint-*"))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model", "/nowhere/at/all"], 1, "nowhere"),
        (["--dataset", "/nowhere/rows.jsonl"], 1, "rows.jsonl"),
        (["--max_length", "3"], 1, "no training row is left"),
        (["--target_modules", "q_prj"], 2, "q_proj"),
        (["--learning_rate", "1e30"], 1, "no longer a number"),
        (["--logging_steps", "0"], 2, "logging_steps"),
        (["--report_to", "wandbb"], 2, "wandbb"),
        (["--early_stop_interval", "2", "--split_dataset_ratio", "0"], 2, "--early_stop_interval 2 needs evaluation rows"),
        (["--lora_rank", "0"], 2, "lora_rank"),
        (["--deepspeed", "zero2"], 2, "--deepspeed zero2 needs several processes"),
        (["--deepspeed", "my_zero.json"], 2, "--deepspeed my_zero.json: neither zero0 to zero3 nor a file"),
        (["--fsdp", "full_shard"], 2, "NPROC_PER_NODE"),
        (["--per_device_train_batch_size", "0"], 2, "per_device_train_batch_size"),
        (["--resume_from_checkpoint", "/nowhere/checkpoint-3"], 1, "no checkpoint"),
        (["--adapters", "/nowhere/checkpoint-3"], 1, "no directory"),
    ],
)
def test_bad_input_is_explained(tmp_path, model, data, capsys, flags, code, message):
    out = tmp_path / "out"
    given = ["--model", str(model), "--dataset", str(data), "--learning_rate", "1e-2", "--output_dir", str(out), "--max_steps", "3"]
    assert cli.main(["sft", *given, *QUIET, *flags]) == code
    assert message in capsys.readouterr().err
    assert not list(out.rglob("*checkpoint-*"))
    if message != "no longer a number":
        assert not out.exists()  # everything is checked before anything is written


def test_nothing_that_learns_is_an_error(model, tmp_path):
    from swiftlite.errors import TrainError
    from swiftlite.models.loading import load_model
    from swiftlite.models.segments import register
    from swiftlite.train.log import Logbook
    from swiftlite.train.loop import LoopSettings, Trainer
    from swiftlite.train.loss import TargetLoss
    from swiftlite.train.plan import Plan, Schedule
    from tests.test_segments import rows

    class Elsewhere:
        def named_parameters(self):
            yield "unused.weight", torch.nn.Parameter(torch.zeros(2, 2))

    loaded = load_model(model, torch.float32, torch.device("cpu"), register()).requires_grad_(False)
    samples = rows(12, 9)
    plan = Plan.make([12, 9], 2, 1, False, False, 0)
    trainer = Trainer(
        loaded, Elsewhere(), TargetLoss(loaded), plan, Schedule(1e-3, "constant", 0, 2), samples, [], 1, LoopSettings(), tmp_path,
        Logbook(tmp_path, 2, [], ()), lambda folder: None, {},
    )  # fmt: skip
    with pytest.raises(TrainError, match=r"unused\.weight"):
        trainer.run()


# (loss, gradient norm) of steps 1 to 5 with torch 2.13 on a CPU: a change here changes what every run learns.
GOLDEN: dict[str, list[tuple[float, float]]] = {
    "lora": [(6.851356, 5.431973), (6.553101, 4.684137), (5.70125, 5.511527), (4.96072, 7.598125), (4.087147, 5.372307)],
    "full": [(6.851356, 6.821519), (5.79012, 5.470115), (4.700149, 5.406519), (3.328603, 4.790979), (2.539423, 3.306528)],
}


@pytest.mark.parametrize("tuner", GOLDEN)
def test_golden_trajectory(tuner, sft):
    flags = ["--tuner_type", tuner, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--max_steps", "5"]
    got = trajectory(sft(*flags, *QUIET))
    assert_close(got, GOLDEN[tuner], 1e-3)
    residual = [a - b for row, want in zip(got, GOLDEN[tuner], strict=True) for a, b in zip(row, want, strict=True)]
    assert abs(sum(residual) / len(residual)) < 1e-4  # a drift to one side shows here first
