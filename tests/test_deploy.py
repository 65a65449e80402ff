"""`swift deploy` as a process: names and settings from flags and checkpoints, readiness, a used port, SIGTERM while it streams."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swiftlite.cli import dispatch
from swiftlite.errors import AdapterError, SwiftError, UsageError
from swiftlite.options.parse import parse

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def model_dir(make_model) -> Path:
    return make_model("llama", max_position_embeddings=4096, eos_token_id=1)


@pytest.fixture(scope="module")
def checkpoint(make_adapter, model_dir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "checkpoint-7"
    shutil.copytree(make_adapter(model_dir, 1), path)
    (path / "sft_args.json").write_text(json.dumps({"model": str(model_dir), "system": "You are small."}))
    return path


@pytest.fixture(scope="module")
def other(make_adapter, model_dir) -> Path:
    return make_adapter(model_dir, 2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status(port: int, path: str = "/health") -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "swiftlite.cli", "deploy", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def plan(*arguments: str):
    from swiftlite.commands.serving import make_plan

    return make_plan(parse("deploy", list(arguments)))


def test_a_server_from_start_to_sigterm(checkpoint, other, model_dir):
    port = free_port()
    process = start("--ckpt_dir", str(checkpoint), "--infer_backend", "pt", "--lora_modules", f"my_tuner={other}", "--port", str(port),
                    "--torch_dtype", "float32", "--max_new_tokens", "3000")  # fmt: skip
    try:
        seen = set()
        until = time.monotonic() + 90
        while (code := status(port)) != 200:
            seen.add(code)
            assert process.poll() is None and time.monotonic() < until, process.stdout.read()
            time.sleep(0.1)
        assert seen <= {None, 503} and 503 in seen  # never another answer before it can serve

        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="EMPTY", max_retries=0)
        assert [model.id for model in client.models.list().data] == [model_dir.name, "default-lora", "my_tuner"]
        ask = {"messages": [{"role": "user", "content": "who are you?"}], "max_tokens": 8, "temperature": 0}
        answers = {name: client.chat.completions.create(model=name, **ask) for name in (model_dir.name, "default-lora", "my-tuner")}
        assert len({answer.choices[0].message.content for answer in answers.values()}) == 3
        prompts = {name: answer.usage.prompt_tokens for name, answer in answers.items()}
        assert prompts["default-lora"] > prompts["my-tuner"] == prompts[model_dir.name]  # its system prompt is its own

        started = time.monotonic()
        second = start("--model", str(model_dir), "--port", str(port))
        output, _ = second.communicate(timeout=60)
        assert second.returncode == 1 and f"port {port}" in output and "in use" in output and "device:" not in output
        assert time.monotonic() - started < 30

        stream = client.completions.create(
            model="my_tuner", prompt="Hello", stream=True, max_tokens=600, extra_body={"ignore_eos": True}, temperature=0
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] == "length"  # the running answer came to its end
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0, output
        assert status(port) is None
        for shown in (model_dir.name, "default-lora, my_tuner", "float32", "KV cache", f"http://127.0.0.1:{port}/v1", "curl"):
            assert shown in output
        assert "Traceback" not in output
    finally:
        process.kill()


def test_a_broken_model_ends_the_server_with_its_reason(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x" * 100)
    process = start("--model", str(tmp_path / "broken"), "--port", str(free_port()))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "error:" in output and "Traceback" not in output


def test_names_of_models_and_adapters(model_dir, checkpoint, other, tmp_path):
    assert plan("--model", str(model_dir)).name == model_dir.name
    assert plan("--model", str(model_dir), "--served_model_name", "x").name == "x"
    assert plan("--model", str(model_dir), "--model_type", "qwen2_5-7b").name == "qwen2_5-7b"
    found = plan("--model", str(model_dir), "--adapters", str(other), f"b={checkpoint}")
    assert found.adapters == {other.name: other, "b": checkpoint}
    found = plan("--ckpt_dir", str(checkpoint))
    assert (found.name, found.model_dir, found.adapters) == (model_dir.name, model_dir, {"default-lora": checkpoint})
    found = plan("--adapters", f"only={checkpoint}")  # its settings name the model
    assert found.model_dir == model_dir
    bare = tmp_path / "bare"
    shutil.copytree(other, bare)  # PEFT's own file names the model
    assert plan("--adapters", str(bare)).model_dir == model_dir


def test_what_cannot_be_served_is_said_before_loading(model_dir, checkpoint, other, tmp_path, capsys):
    with pytest.raises(UsageError, match="two adapters"):
        plan("--model", str(model_dir), "--adapters", f"a={other}", f"a={checkpoint}")
    with pytest.raises(UsageError, match="base model's name"):
        plan("--model", str(model_dir), "--adapters", f"{model_dir.name}={other}")
    with pytest.raises(UsageError, match="cannot be an adapter's name"):
        plan("--model", str(model_dir), "--adapters", f"a/b={other}")
    with pytest.raises(AdapterError, match="not a directory"):
        plan("--model", str(model_dir), "--adapters", f"a={tmp_path / 'none'}")
    with pytest.raises(AdapterError, match="no adapter_config"):
        plan("--model", str(model_dir), "--adapters", f"a={tmp_path}")
    with pytest.raises(SwiftError, match="ports are"):
        dispatch(["deploy", "--model", str(model_dir), "--port", "70000"])
    with pytest.raises(SwiftError, match="top_p"):
        dispatch(["deploy", "--model", str(model_dir), "--port", str(free_port()), "--top_p", "7"])
    with pytest.raises(UsageError, match="max_new_tokens must be at least 1"):
        dispatch(["deploy", "--model", str(model_dir), "--port", str(free_port()), "--max_new_tokens", "0"])
    with pytest.raises(UsageError, match=r"adapter_dir .*none is not a directory"):
        dispatch(["deploy", "--model", str(model_dir), "--port", str(free_port()), "--adapter_dir", str(tmp_path / "none")])
    assert "device:" not in capsys.readouterr().out
    plan("--model", str(model_dir), "--infer_backend", "vllm", "--vllm_enable_lora", "true")
    assert "native engine answers" in capsys.readouterr().out


def test_generation_settings_come_from_the_model_then_the_command_line():
    from swiftlite.server.protocol import generation_defaults

    file = {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "eos_token_id": 2,
        "repetition_penalty": 1.05,
        "max_length": 20,
    }
    assert generation_defaults(file) == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    assert generation_defaults({"do_sample": False, "top_p": None, "temperature": "x"}) == {"temperature": 0.0}
