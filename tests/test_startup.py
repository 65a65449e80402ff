"""The quick start changes when things are imported, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from swiftlite import startup

START = """
import gc, sys, threading
if "off" in sys.argv:
    gc.disable()
from swiftlite import LLM, SamplingParams
import torch
print("collecting", gc.isenabled(), "frozen", gc.get_freeze_count() > 10000, "threads", threading.active_count(), torch.ones(2).sum())
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [("on", "collecting True frozen True threads 1 tensor(2.)"), ("off", "collecting False frozen False threads 1 tensor(2.)")],
)
def test_importing_leaves_the_collector_as_it_was_and_no_thread(given: str, said: str) -> None:
    """And nothing is complained about at the exit, as extension modules do when what was frozen is never collected."""
    done = subprocess.run([sys.executable, "-c", START, given], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == said and done.stderr == ""


def test_what_cannot_be_read_ahead_is_left_to_who_needs_it(tmp_path: Path) -> None:
    startup._read_ahead(tmp_path / "missing")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    startup._read_ahead(tmp_path)
