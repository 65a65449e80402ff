"""Two processes that train together, kept warm: each runs one command line after another, as `launch` would have it run anew.

As a script: one of them. It reads JSON lines {"argv": [...], "port": N} and answers each with [exit code, what was printed].
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path


class Pair:
    """`pair(*argv)` runs `swift *argv` in both processes -> what the first printed; asserts both exit codes."""

    def __init__(self) -> None:
        self.workers = []
        for rank in ("0", "1"):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            self.workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.pair"], env={**os.environ, **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    text=True, cwd=Path(__file__).parents[1],
                )
            )  # fmt: skip

    def __call__(self, *argv: str, code: int = 0) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        for worker in self.workers:
            worker.stdin.write(json.dumps({"argv": argv, "port": port}) + "\n")
            worker.stdin.flush()
        answers = [json.loads(worker.stdout.readline() or '[-1, "it is gone"]') for worker in self.workers]
        assert [answer[0] for answer in answers] == [code, code], "\n---\n".join(answer[1] for answer in answers)
        assert "Traceback" not in answers[0][1]
        return answers[0][1]

    def close(self) -> None:
        for worker in self.workers:
            worker.stdin.close()
        for worker in self.workers:
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                worker.kill()


def main() -> None:
    from swiftlite import cli

    answer = os.fdopen(os.dup(1), "w")
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for line in sys.stdin:
        task = json.loads(line)
        os.environ["MASTER_PORT"] = task["port"]
        printed = io.StringIO()
        sys.stdout = sys.__stdout__  # a run that was not the first has silenced it
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = cli.main(task["argv"])
            except BaseException:  # answered, so that the test shows it
                traceback.print_exc()
                code = -1
        print(json.dumps([code, printed.getvalue()]), file=answer, flush=True)


if __name__ == "__main__":
    main()
