"""What the README and examples/ tell a newcomer to type is true: every command parses, the scripts run."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from swiftlite.options.concerns import COMMANDS
from swiftlite.options.parse import parse

ROOT = Path(__file__).parent.parent


def swift_commands(text: str) -> list[str]:
    """Every `swift <command> ...` of fenced blocks and inline code, continuation lines joined, comments cut."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(swift [^`]+)`", text)
    return [line.split(" #")[0].replace("\\|4", "").strip() for line in lines if line.startswith("swift ")]


@pytest.mark.parametrize("name", ["README.md", "examples/README.md"])
def test_every_command_of_the_docs_parses(name):
    commands = swift_commands((ROOT / name).read_text())
    assert commands
    for command in commands:
        words = shlex.split(command)
        if words[1] not in COMMANDS:  # the overview line `swift sft | export | ...`
            assert "|" in command or "<command>" in command, command
        elif "|" not in words and "--help" not in words:
            parse(words[1], [word for word in words[2:] if word != "&"])


def test_every_path_of_the_docs_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([\w./-]+)\)", text) + re.findall(r"`((?:swiftlite|tests|scripts|examples)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def run(*argv: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, "COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_offline_example():
    out = run("examples/offline.py")
    assert "成都" in out and "Paris" in out and "杭州" in out


def test_sft_example_then_deploy_and_ask_with_the_openai_example(tmp_path):
    out = run("-m", "swiftlite.cli", "sft", "examples/sft.yaml", "--output_dir", str(tmp_path))
    checkpoint = re.search(r"last_model_checkpoint: (\S+)", out)
    assert checkpoint, out
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "swiftlite.cli", "deploy", "--ckpt_dir", checkpoint[1], "--port", str(port)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        answers = run("examples/openai_client.py", f"http://127.0.0.1:{port}/v1")
    finally:
        server.terminate()
        assert server.wait(30) == 0
    assert "default-lora:" in answers and "tiny-chat:" in answers and "杭州" not in answers.splitlines()[0]
