"""Command line (and YAML/JSON file) -> Options.

argparse does the parsing; this module only feeds it: flags from the dataclasses of `concerns`, names through `aliases`, and
a "did you mean" for what neither knows. It knows nothing of models or checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from swiftlite.errors import UsageError
from swiftlite.options.aliases import ALIASES, NO_EFFECT, VALUES
from swiftlite.options.concerns import COMMANDS


class Options:
    """The resolved flags of one command: `options.learning_rate`, and where each value came from in `origins`.

    Flags are unique across the concerns of a command, so they live in one flat namespace. `set` is for the resolution step
    (`resolve.inherit`) only; everywhere else Options is read.
    """

    def __init__(self, command: str, values: dict[str, Any], origins: dict[str, str]) -> None:
        self.command, self.values, self.origins = command, values, origins

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"`swift {self.command}` has no flag --{name}") from None

    def set(self, name: str, value: Any, origin: str) -> None:
        self.values[name], self.origins[name] = value, origin

    def given(self, name: str) -> bool:
        """True when the user set the flag, on the command line or in a file."""
        return self.origins[name] != "default"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag as the parser needs it."""

    name: str
    kind: Callable[[str], Any]
    many: bool
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    concern: type[Any]


def flags_of(command: str) -> dict[str, Flag]:
    """Name -> Flag for one command, in the order of its concerns."""
    found: dict[str, Flag] = {}
    for concern in COMMANDS[command][1]:
        hints = typing.get_type_hints(concern)
        for field in dataclasses.fields(concern):
            hint, optional = hints[field.name], False
            if isinstance(hint, types.UnionType):
                hint, optional = next(a for a in typing.get_args(hint) if a is not type(None)), True
            many = typing.get_origin(hint) is tuple
            kind = typing.get_args(hint)[0] if many else hint
            found[field.name] = Flag(
                field.name, kind, many, optional, field.default, field.metadata["help"], field.metadata["choices"], concern
            )
    return found


def boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "1", "yes", "on"):
        return True
    if lowered in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def _reader(flag: Flag) -> Callable[[str], Any]:
    """Reads one value; a number that is ours to choose may be left to us by name, `auto`."""
    kind = boolean if flag.kind is bool else flag.kind
    if not flag.optional or kind is str:
        return kind

    def read(text: str) -> Any:
        return text if text == "auto" else kind(text)

    read.__name__ = kind.__name__  # argparse's message says it
    return read


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{self.prog}: {message}", fix=f"{self.prog} --help lists the flags")


def _canonical(token: str, flags: dict[str, Flag], command: str) -> tuple[str | None, str]:
    """A `--flag[=value]` token -> (our flag's name, or None when it is accepted without effect; the token to parse)."""
    written, equals, value = token.partition("=")
    name = written.lstrip("-").replace("-", "_")
    if name in flags:
        return name, f"--{name}{equals}{value}"
    target = ALIASES.get(name)
    if target in flags:
        return target, f"--{target}{equals}{value}"
    if name in NO_EFFECT:
        return None, token
    known = [*flags, *(alias for alias, target in ALIASES.items() if target in flags), *NO_EFFECT]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    raise UsageError(
        f"swift {command}: unknown flag {written}",
        fix=f"did you mean --{close[0]}?" if close else f"swift {command} --help lists the flags",
    )


def _is_flag(token: str) -> bool:
    return token == "-m" or bool(re.match(r"--[A-Za-z]", token))


def _rewrite(argv: list[str], flags: dict[str, Flag], command: str) -> tuple[list[str], list[str]]:
    """argv with canonical flag names, and the notes about flags without effect."""
    rewritten: list[str] = []
    notes: list[str] = []
    skipping, current = False, ""
    for token in argv:
        if _is_flag(token):
            name, token = _canonical(token, flags, command)
            skipping, current = name is None, name or ""
            if skipping:
                flag = token.partition("=")[0]
                notes.append(f"{flag} has no effect here: {NO_EFFECT[flag.lstrip('-').replace('-', '_')]}")
                continue
            head, equals, value = token.partition("=")
            rewritten.append(f"{head}={VALUES.get(current, {}).get(value, value)}" if equals else head)
        elif not skipping:
            rewritten.append(VALUES.get(current, {}).get(token, token))
    return rewritten, notes


def build_parser(command: str, flags: dict[str, Flag]) -> argparse.ArgumentParser:
    """The argparse parser; defaults are absent so that what was given can be told from what was not."""
    summary, concerns = COMMANDS[command]
    parser = _Parser(
        prog=f"swift {command}",
        description=summary + ".",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="A YAML or JSON file as first argument fills flags. SWIFT 2.x, 3.x and 4.x names are accepted; '-' and '_' are equal.",
        formatter_class=lambda prog: argparse.HelpFormatter(
            prog, max_help_position=34, width=min(120, os.get_terminal_size().columns if os.isatty(1) else 100)
        ),
        usage=f"swift {command} [config.yaml] [--flag value ...]",
    )
    for concern in concerns:
        group = parser.add_argument_group((concern.__doc__ or concern.__name__).splitlines()[0].rstrip("."))
        for flag in (f for f in flags.values() if f.concern is concern):
            default = " ".join(map(str, flag.default)) if flag.many else flag.default
            shown = "" if flag.default in (None, (), "") else f" [{str(default).lower() if flag.kind is bool else default}]"
            kwargs: dict[str, Any] = {"help": (flag.help + shown).replace("%", "%%"), "dest": flag.name}
            if flag.kind is bool:
                kwargs |= {"type": _reader(flag), "nargs": "?", "const": True, "metavar": "true|false"}
            else:
                kwargs |= {"type": _reader(flag), "metavar": flag.name.rsplit("_", 1)[-1].upper()}
                if flag.choices:
                    kwargs |= {"choices": (*flag.choices, "none") if flag.optional else flag.choices, "metavar": "|".join(flag.choices)}
                if flag.many:
                    kwargs |= {"nargs": "*", "action": "extend"}
            group.add_argument(f"--{flag.name}", **kwargs)
    return parser


def read_file(path: str) -> dict[str, Any]:
    """A YAML or JSON file of flags. Its `ENV` map (SWIFT's) is put into the environment."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            content = json.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"cannot read {path}", str(error.strerror)) from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON", str(error)) from None
    except Exception as error:  # yaml.YAMLError, without importing yaml for JSON users
        raise UsageError(f"{path} is not valid YAML", str(error)) from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold one mapping of flags to values")
    os.environ.update({str(k): str(v) for k, v in (content.pop("ENV", None) or {}).items()})
    return content


def _file_argv(content: dict[str, Any]) -> list[str]:
    """A mapping as the tokens a user would have typed, so that a file goes through the same checks."""
    argv: list[str] = []
    for name, value in content.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        if isinstance(value, list) or not str(values[0]).startswith("-"):
            argv += [f"--{name}", *(str(v) for v in values)]
        else:
            argv.append(f"--{name}={values[0]}")
    return argv


def parse(command: str, argv: list[str]) -> Options:
    """Flags of `swift <command>`.

    Raises UsageError for anything unknown or malformed. Prints one note per flag that has no effect. `--help` prints and
    raises SystemExit(0).
    """
    flags = flags_of(command)
    parser = build_parser(command, flags)
    values: dict[str, Any] = {name: flag.default for name, flag in flags.items()}
    origins = dict.fromkeys(values, "default")
    sources = [("command line", argv)]
    if argv and re.search(r"\.(ya?ml|json)$", argv[0]):
        sources = [(argv[0], _file_argv(read_file(argv[0]))), ("command line", argv[1:])]
    for origin, tokens in sources:
        tokens = ["--help" if token == "-h" else token for token in tokens]
        if "--help" in tokens:
            parser.print_help()
            raise SystemExit(0)
        rewritten, notes = _rewrite(tokens, flags, command)
        for note in notes:
            print(f"note: {note}")
        try:
            found = vars(parser.parse_args(rewritten))
        except argparse.ArgumentError as error:
            raise UsageError(f"swift {command}: {error}") from None
        for name, value in found.items():
            flag = flags[name]
            if flag.many:
                value = tuple(part for item in value for part in _split(name, item))
            if value == "none" and flag.choices:
                value = None
            if name == "system":
                value = _system(value)
            left_out = value == "auto" and flag.kind is not str
            values[name], origins[name] = (flag.default, "default") if left_out else (value, origin)
    return Options(command, values, origins)


def from_mapping(command: str, settings: dict[str, Any]) -> Options:
    """Options from Python values, through the same checks as the command line. Raises UsageError."""
    return parse(command, _file_argv(settings))


def _split(name: str, item: str) -> list[str]:
    # SWIFT 2.x also took comma-separated datasets; a comma inside an existing path stays.
    return item.split(",") if name in ("dataset", "val_dataset") and "," in item and not os.path.exists(item) else [item]


def _system(written: str) -> str:
    """--system: the text itself, or that of a .txt file. It is read here, so that settings hold the text: the file may be gone when
    they are used again."""
    path = os.path.isfile(written) or (written.isascii() and len(written.split()) == 1)  # else words that end in a file's name
    if not written.endswith(".txt") or not path:
        return written
    try:
        return Path(written).expanduser().read_text(encoding="utf-8-sig").strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 text: {error}"
        raise UsageError(f"--system: cannot read the file {written}", str(why), "check the path, or write the prompt itself") from None
