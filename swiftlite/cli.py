"""`swift <command> ...`: the one dispatcher. It imports nothing heavy; a command's module is imported after its flags parse.

Exit codes: 0 done (also after Ctrl-C in a chat or a server), 1 the command failed, 2 the command line is wrong, 130 Ctrl-C
during work.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path

from swiftlite import __version__
from swiftlite.disk import REFUSED, mount
from swiftlite.errors import SwiftError, UsageError
from swiftlite.options.concerns import COMMANDS

OTHER_NAMES = {"app": "app-ui", "app_ui": "app-ui", "web-ui": "app-ui", "merge-lora": "export", "merge_lora": "export", "pt": "sft"}


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: swift <command> [config.yaml] [--flag value ...]",
            "",
            *lines,
            "",
            "swift <command> --help lists a command's flags. Try it without any download:",
            "  swift infer --model tiny-chat",
        ]
    )


def dispatch(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(f"swiftlite {__version__}")
        return 0
    written, rest = argv[0], argv[1:]
    command = OTHER_NAMES.get(written, written)
    if command not in COMMANDS:
        close = difflib.get_close_matches(written, [*COMMANDS, *OTHER_NAMES], n=1, cutoff=0.5)
        raise UsageError(
            f"swift: unknown command {written!r}", fix=f"did you mean `swift {close[0]}`?" if close else "swift --help lists the commands"
        )
    if command == "export" and written in ("merge-lora", "merge_lora"):
        rest = [*rest, "--merge_lora", "true"]
    from swiftlite.options.parse import parse

    options = parse(command, rest)
    module = importlib.import_module("swiftlite.commands." + command.replace("-", "_"))
    return module.main(options) or 0


def main(argv: list[str] | None = None) -> int:
    """Console entry point."""
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except SwiftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `swift ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        fix = f"\n  fix: make room on {mount(Path(str(error.filename)))}" if error.filename else ""
        print(f"error: the disk takes no more\n  why: {error}{fix}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
