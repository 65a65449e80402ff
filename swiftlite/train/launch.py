"""NPROC_PER_NODE (with NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT): this command again, once per process.

What torchrun does, with the environment it sets, but a signal lets the processes save and leave on their own terms, exit
codes are those of `swift`, and an error is printed once. Under torchrun itself nothing is launched. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from types import FrameType
from typing import IO

from swiftlite.errors import TrainError, UsageError
from swiftlite.train.ranks import LOST

NOT_BEGUN = "stopped before training began; nothing was to be saved"
GRACE = 10.0  # seconds for the first process to explain itself after another has failed, and for the one at fault to end


def wanted(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes to launch here: 0 when this one trains itself. UsageError for NPROC_PER_NODE that is no number."""
    if "RANK" in environment:
        return 0
    here, machines = (_number(environment, name, 1) for name in ("NPROC_PER_NODE", "NNODES"))
    return here if here * machines > 1 else 0


def launch(argv: list[str], processes: int, environment: Mapping[str, str] = os.environ) -> int:
    """Run `swift *argv` in so many processes; the exit code of the first, or of whichever failed."""
    machines, machine = _number(environment, "NNODES", 1), _number(environment, "NODE_RANK", 0, least=0)
    if machine >= machines:
        raise UsageError(f"NODE_RANK is {machine}, of NNODES {machines}", fix="machines count from 0")
    if machines > 1 and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise UsageError("several machines need MASTER_ADDR and MASTER_PORT", fix="set both to an address of machine 0, everywhere alike")
    common = {
        **environment, "WORLD_SIZE": str(processes * machines), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": environment.get("MASTER_ADDR", "127.0.0.1"), "MASTER_PORT": environment.get("MASTER_PORT") or _free_port(),
    }  # fmt: skip
    print(f"{processes} processes" + (f" on machine {machine} of {machines}" if machines > 1 else ""), flush=True)
    running: list[subprocess.Popen[bytes]] = []
    told: list[int] = []  # signals passed on
    with tempfile.TemporaryFile() as errors:  # of all but the first: most say the same

        def forward(number: int, frame: FrameType | None) -> None:
            told.append(number)
            for process in running:
                if process.poll() is None:
                    process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for local in range(processes):
                own = {"RANK": str(machine * processes + local), "LOCAL_RANK": str(local)}
                # a session of its own: Ctrl-C of the terminal reaches it once, through `forward`
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "swiftlite.cli", *argv], env=common | own, start_new_session=True,
                        stderr=errors if local else None,
                    )
                )  # fmt: skip
            return _wait(running, errors, told)
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)


def _wait(running: list[subprocess.Popen[bytes]], errors: IO[bytes], told: list[int]) -> int:
    while True:
        codes = [process.poll() for process in running]
        if signal.SIGTERM in told and -signal.SIGTERM in codes:  # the loop would have caught it
            print("stopped before training began or after it ended; nothing was to be saved")
            return 0
        failed = [number for number, code in enumerate(codes) if code]
        if failed:
            deadline = time.monotonic() + GRACE
            while None in codes and (codes[0] is None or set(codes) <= {None, 0, LOST}) and time.monotonic() < deadline:
                time.sleep(0.05)
                codes = [process.poll() for process in running]
            killed = next((number for number, code in enumerate(codes) if code is not None and code < 0 and -code not in told), None)
            spoke = any(code and code > 0 and code != LOST for code in codes)  # NCCL aborts those that miss one that failed
            if killed is not None and (codes[killed] == -signal.SIGKILL or not spoke):  # it said nothing, and the others only miss it
                name = _signal_name(-(codes[killed] or 0))
                why = "the system does that when memory runs out" if name == "SIGKILL" else "somebody or the system ended it, or it crashed"
                raise TrainError(
                    f"process {killed} was killed ({name})", why, "--resume_from_checkpoint goes on from the last checkpoint"
                )  # fmt: skip
            if codes[0] and (codes[0] != LOST or not spoke):  # it has said why; what it lost may be on another machine
                return _exit_code(codes[0])
            left = next((number for number, code in enumerate(codes) if code and code != LOST), failed[0])
            raise TrainError(f"process {left} failed (exit code {codes[left]})", _tail(errors))
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _tail(errors: IO[bytes]) -> str:
    errors.seek(0)
    return "\n".join(errors.read().decode(errors="replace").strip().splitlines()[-12:])


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _number(environment: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{name} must be a number from {least} up, got {text!r}", fix=f"unset {name}, or correct it")
    return int(text)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
