"""Messages for mistakes on the command line: what the parser rejected, in one sentence, with a suggestion."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from lit_rlhf.algorithms import Algorithm
from lit_rlhf.data import TextData

PROGRAM = "lit-rlhf"
COMMANDS = ("fit", "validate", "test", "predict", "export", "compare")
CONFIG_FLAGS = ("--config", "-c")
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BASES: dict[str, type] = {"model": Algorithm, "data": TextData}
"""Base classes of the options that take a class."""

UNINFORMATIVE = re.compile(
    r"$|Does not validate|Subtypes:|Errors:|Given value type:|Expected a path but|Expected a? ?<class 'NoneType'>"
)
"""Lines of jsonargparse's messages that say nothing about the mistake."""
UNKNOWN_OPTION = re.compile(
    r"Option '([\w.]+)' is not accepted|Subcommand '\w+' does not accept option '([\w.]+)'"
    r"|Group '([\w.]+)' does not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)"
)
IMPORT_FAILED = re.compile(r"No module named|has no attribute|cannot import name")


class UsageError(Exception):
    """Command line that can't be parsed.

    Attributes:
        sentence: What is wrong, with the nearest right spelling.
        tip: Command that shows the options.
    """

    def __init__(self, sentence: str, tip: str = "") -> None:
        super().__init__(sentence)
        self.sentence, self.tip = sentence, tip


@dataclass(frozen=True)
class Rejection:
    """A mistake that the parser found.

    Attributes:
        option: Dotted name of the option, such as `model.rewards`; empty for the command line as a whole.
        owner: Import path of the class whose options the mistake is in, or empty.
        reason: The parser's words.
        value: The rejected value, or empty.
    """

    option: str
    owner: str
    reason: str
    value: str = ""


def explain(message: str, args: Sequence[str], program: str, options: Sequence[str]) -> UsageError:
    """Turn a message of the parser into one sentence and a tip.

    Args:
        message: jsonargparse's message, with all that it tried.
        args: Arguments of the command.
        program: Program and command, such as `lit-rlhf fit`.
        options: Dotted names of the parser's options.
    """
    rejections = read_message(message)
    first = next((found for found in rejections if not found.reason.startswith("Expected ")), rejections[0])
    sentence = (
        wrong_config(args, program)
        or wrong_command(first)
        or wrong_name(first)
        or wrong_option(first, options)
        or wrong_value(first, [found for found in rejections if found.option == first.option])
    )
    listing = f"--{first.option}.help={first.owner}" if first.owner and first.option in BASES else "--help"
    return UsageError(sentence, f"`{program} {listing}` lists the options")


def read_message(message: str) -> list[Rejection]:
    """Parse jsonargparse's indented message into the mistakes it names, at least one."""
    found: list[Rejection] = []
    path: list[tuple[int, str, str]] = []  # indentation, option, class
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if UNINFORMATIVE.match(text):
            continue
        indent = len(line) - len(line.lstrip())
        while path and path[-1][0] >= indent and not text.startswith("Given value: "):
            path.pop()
        owner = path[-1][2] if path else ""
        if match := re.match(r'Parser key "(.+?)":', text):
            path.append((indent, match[1], owner))
        elif match := re.match(r"Problem with given class_path '(.+?)':", text):
            path.append((indent, "", match[1]))
        elif text.startswith("Given value: "):
            value = re.sub(r"^NestedArg\(key='.*?', val=(.*)\)$", r"\1", text.removeprefix("Given value: ")).strip("'")
            found = [Rejection(r.option, r.owner, r.reason, r.value or value) for r in found]
        else:
            reason, _, value = text.partition(". Got value: ")
            if match := re.match(r"Namespace\(class_path='(.+?)'", value):
                owner = match[1]
            found.append(Rejection(".".join(name for _, name, _ in path if name), owner, reason, value))
    return found or [Rejection("", "", message)]


def wrong_config(args: Sequence[str], program: str) -> str:
    """Return the sentence for a configuration of another command."""
    compares = program.endswith(" compare")
    for previous, arg in zip(["", *args], args, strict=False):
        flag, separator, value = arg.partition("=")
        flag, value = (flag, value) if separator else (previous, arg)
        path = Path(value)
        if flag not in CONFIG_FLAGS or path.suffix not in (".yaml", ".yml") or not path.is_file():
            continue
        try:
            keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
            return f"--config {value!r} is not valid YAML: {error.problem}{line}"
        if isinstance(keys, dict) and ("model" if compares else "arms") in keys:
            command = "fit, validate, test and predict" if compares else f"`{PROGRAM} compare`"
            return f"--config {value!r} is for {command}"
    return ""


def wrong_command(found: Rejection) -> str:
    """Return the sentence for an unknown command or an argument without an option."""
    if match := re.search(r"invalid choice: '(.*?)'", found.reason):
        return f"there is no command {match[1]!r}: {suggestion(match[1], COMMANDS) or 'use ' + ', '.join(COMMANDS)}"
    if match := re.match(r"unrecognized arguments: ([^-]\S*)", found.reason):
        return f"unexpected argument {match[1]!r}: options start with --"
    return ""


def wrong_name(found: Rejection) -> str:
    """Return the sentence for an unknown class or function, or for a file in place of a class.

    Raises:
        Exception: What the import of a user's module raises.
    """
    flag, base = f"--{found.option}", BASES.get(found.option)
    if found.option == "data" and found.value.endswith(DATA_SUFFIXES):
        return f"--data {found.value!r} is a file, and --data takes a class: did you mean --data.train?"
    if match := re.match(r"Expected a dot import path string: (.*)", found.reason):
        if base is None:
            return f"{flag} {match[1]!r} is not an import path: give module.Name"
        known = sorted(kind.__name__ for kind in subclasses(base))
        hint = suggestion(match[1], known) or "a class of yours needs its module: mine.Name"
        return f"{flag} {match[1]!r} is not one of {', '.join(known)}: {hint}"
    path = found.value if is_import_path(found.value) else found.owner
    return unknown_import(flag, path) if IMPORT_FAILED.search(found.reason) and is_import_path(path) else ""


def unknown_import(flag: str, path: str) -> str:
    """Return the sentence for a `module.name` that doesn't exist, or nothing; what the import raises comes through."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(error.name or module_name):
            raise
        return f"{flag} {path!r}: there is no module {error.name!r}, also not in {str(Path.cwd())!r}"
    if hasattr(module, name):
        return ""
    public = [known for known in vars(module) if not known.startswith("_")]
    hint = suggestion(name, public) or f"it has {', '.join(sorted(public)[:20])}"
    return f"{flag} {path!r}: the module {module_name!r} has no {name!r}: {hint}"


def wrong_option(found: Rejection, options: Sequence[str]) -> str:
    """Return the sentence for an unknown option, with the nearest known one."""
    match = UNKNOWN_OPTION.search(found.reason)
    if match is None:
        return ""
    name = without_init_args(".".join(part for part in match.groups() if part))
    prefix = f"{found.option}." if found.option else ""
    problem = f"there is no option --{prefix}{name}"
    own = class_options(import_object(found.owner)) if found.owner else []
    if found.owner:
        problem = f"--{prefix}{name}: {found.owner.rpartition('.')[2]} has no such option"
    owners: dict[str, list[str]] = {option: [] for option in options}
    for root, base in BASES.items():
        shipped = (kind for kind in subclasses(base) if kind.__module__.startswith("lit_rlhf."))
        for kind in sorted(shipped, key=lambda kind: kind.__name__):
            for option in class_options(kind):
                owners.setdefault(f"{root}.{option}", []).append(kind.__name__)
    if others := owners.get(f"{prefix}{name}"):
        return f"{problem}: it is one of {', '.join(others)}"
    near = nearest_option(name, own, cutoff=0.6)
    near = f"{prefix}{near}" if near else nearest_option(f"{prefix}{name}", list(owners), cutoff=0.8)
    return f"{problem}: did you mean --{near}?" if near else problem


def wrong_value(first: Rejection, found: Iterable[Rejection]) -> str:
    """Return the sentence for a value of a wrong type, or else the parser's own words."""
    expected = [match[1] for rejection in found if (match := re.match(r"Expected (?:an? )?(.*)", rejection.reason))]
    if first.value and expected and first.reason.startswith("Expected"):
        kinds = [re.sub(r"<class '(?:.*\.)?(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", kind) for kind in expected]
        return f"--{first.option} {first.value!r}: expected {' or '.join(dict.fromkeys(kinds))}"
    reason = " ".join(first.reason.split())
    return f"--{first.option} {first.value}".strip() + f": {reason}" if first.option else reason


def nearest_option(name: str, known: Sequence[str], cutoff: float) -> str:
    """Return the known option with the same last part, or else the one of the most similar spelling, or nothing."""
    last = name.rpartition(".")[2]
    same = [option for option in known if option.rpartition(".")[2] == last]
    close = difflib.get_close_matches(name, same or known, 1, 0.0 if same else cutoff)
    return close[0] if close else ""


def option_names(parser: ArgumentParser) -> list[str]:
    """Return the dotted names of a parser's options."""
    names = (name for name in parser.get_defaults().keys() if not name.endswith(".class_path"))
    return list(dict.fromkeys(without_init_args(name) for name in names))


def class_options(kind: Callable[..., Any]) -> list[str]:
    """Return the names of the options of a class or function."""
    parser = ArgumentParser(exit_on_error=False)
    add_arguments = parser.add_class_arguments if inspect.isclass(kind) else parser.add_function_arguments
    add_arguments(kind, fail_untyped=False)
    return option_names(parser)


def without_init_args(name: str) -> str:
    """Return an option's name as it is written on the command line."""
    return re.sub(r"\.(class_path|init_args)\b", "", name)


def is_import_path(text: str) -> bool:
    """Return whether a text looks like `module.name`."""
    return "." in text and all(part.isidentifier() for part in text.split("."))


def import_object(path: str) -> Any:
    """Import `module.name`."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return "did you mean X?" for the most similar name, or nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else ""


def subclasses(base: type) -> set[type]:
    """Return all concrete classes below a class that have been imported."""
    children: list[type] = base.__subclasses__()
    below = {kind for child in children for kind in {child} | subclasses(child)}
    return {kind for kind in below if not inspect.isabstract(kind)}
