"""Messages for mistakes on the command line: what the parser rejected, in one sentence, with a suggestion."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lit_rlhf.algorithms import Algorithm
from lit_rlhf.cli.config_files import DATA_SUFFIXES, PROGRAM, UsageError, shipped_configs
from lit_rlhf.cli.messages import OTHER_NAMES, REWORDED, Rejection, read_message
from lit_rlhf.data import TextData

COMMANDS = ("fit", "validate", "test", "predict", "export", "compare", "memory")
BASES: dict[str, type] = {"model": Algorithm, "data": TextData}
"""Base classes of the options that take a class."""
HOMES = {
    "model.rewards": ["lit_rlhf", "lit_rlhf.rewards", "lit_rlhf.testbed"],
    "model.evaluation.judge": ["lit_rlhf", "lit_rlhf.rewards", "lit_rlhf.testbed"],
    "model.optimizer": ["torch.optim"],
    "model.lr_scheduler": ["lit_rlhf", "torch.optim.lr_scheduler"],
    "data.transform": ["lit_rlhf.data"],
    "trainer.callbacks": ["lit_rlhf.callbacks", "lightning.pytorch.callbacks"],
    "trainer.logger": ["lightning.pytorch.loggers"],
    "trainer.strategy": ["lightning.pytorch.strategies"],
    "trainer.profiler": ["lightning.pytorch.profilers"],
}
"""Modules with classes and functions for other options that take an import path."""

CONFIGURED = {
    "--model": "a configuration, such as --config rloo, or --model METHOD and --data CLASS",
    "--data": "a configuration, such as --config rloo, or --data CLASS, such as PromptData",
    "--test_args": "a comparison, such as --config paper/testbed",
}
"""What to give if these options are missing."""
UNKNOWN_OPTION = re.compile(
    r"Option '([\w.]+)' is not accepted|Subcommand '\w+' does not accept option '([\w.]+)'"
    r"|Group '([\w.]+)' does not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)"
)
PATH_EXPECTED = re.compile(r"Expected a dot import path string: ?(.*)")
IMPORT_FAILED = re.compile(r"No module named|has no attribute|cannot import name")
REQUIRED = re.compile(r"the following arguments are required: (.*)")


def explain(message: str, args: Sequence[str], program: str, options: Sequence[str]) -> UsageError:
    """Turn a message of the parser into one sentence and a tip.

    Args:
        message: jsonargparse's message, with all that it tried.
        args: Arguments of the command.
        program: Program and command, such as `lit-rlhf fit`.
        options: Dotted names of the parser's options.
    """
    rejections = read_message(message)
    plain = [found for found in rejections if not found.reason.startswith("Expected ")]
    plain.sort(key=lambda found: found.reason.startswith("Not a valid subclass"))  # says less than the others
    names = (found for found in rejections if PATH_EXPECTED.match(found.reason) and found.option in (*HOMES, *BASES))
    first = next(names, None) or next(iter(plain), rejections[0])
    sentence = (
        wrong_command(first)
        or missing_value(first, args)
        or missing_option(first)
        or wrong_name(first)
        or wrong_option(first, options)
        or wrong_value(first, [found for found in rejections if found.option == first.option])
    )
    if program == PROGRAM and args and args[0] in COMMANDS:
        program = f"{program} {args[0]}"
    listing = f"--{first.option}.help={first.owner}" if first.owner and first.option in BASES else "--help"
    return UsageError(sentence, f"`{program} {listing}` lists the options")


def wrong_command(found: Rejection) -> str:
    """Return the sentence for an unknown command or an argument without an option."""
    if match := re.search(r"invalid choice: '(.*?)'", found.reason):
        return f"there is no command {match[1]!r}: {suggestion(match[1], COMMANDS) or 'use ' + ', '.join(COMMANDS)}"
    if match := re.match(r"unrecognized arguments: (--(?= |$)|---\S*|-?[^-\s]\S*|$)", found.reason):
        if match[1] in shipped_configs():
            return f"unexpected argument {match[1]!r}: did you mean --config {match[1]}?"
        return f"unexpected argument {match[1]!r}: options start with --"
    return ""


def missing_value(found: Rejection, args: Sequence[str]) -> str:
    """Return the sentence for an option at the end, or before another one, without its value."""
    if not re.search(r"expected (one|at least one) argument", found.reason):
        return ""
    options = (arg for arg, following in zip(args, [*args[1:], "--"], strict=True) if following.startswith("--"))
    wanted = (f"--{found.option}", f"--{found.option}.", "-c")
    option = next((arg for arg in options if "=" not in arg and arg.startswith(wanted)), f"--{found.option}")
    return f"{option} needs a value"


def missing_option(found: Rejection) -> str:
    """Return the sentence for required options that are missing."""
    match = REQUIRED.match(found.reason)
    if match is None:
        return ""
    names = [re.sub(rf"^({'|'.join(COMMANDS)})\.", "", name) for name in match[1].split(", ")]
    names = [f"--{found.option}.{name}" if found.option else f"--{name}" for name in names]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    if found.owner:
        return f"{found.owner.rpartition('.')[2]} needs {listed}"
    hint = f": give {CONFIGURED[names[-1]]}" if names[-1] in CONFIGURED else ""
    return f"{listed} {'is' if len(names) == 1 else 'are'} required{hint}"


def wrong_name(found: Rejection) -> str:
    """Return the sentence for an unknown class or function, or for a file in place of a class.

    Raises:
        Exception: What the import of a user's module raises.
    """
    flag, base = f"--{found.option}", BASES.get(found.option)
    if found.reason.startswith("Expected an instantiatable class") and flag in CONFIGURED:
        if missing := abstract_methods(found.value or ""):
            return f"{flag} {found.value!r} must define {' and '.join(missing)}"
        return f"{flag} is missing: give {CONFIGURED[flag]}"
    if found.option == "data" and found.value and found.value.endswith(DATA_SUFFIXES):
        return f"--data {found.value!r} is a file, and --data takes a class: did you mean --data.train?"
    match = PATH_EXPECTED.match(found.reason)
    if match and (base or found.option in HOMES or found.value is None):
        if base is None:
            known = [f"{home}.{name}" for home in HOMES.get(found.option, ()) for name in public_names(home)]
            hint = nearest_path(match[1], known) or "give its module too, such as mine.reward for a function in mine.py"
            return f"{flag} {match[1]!r} is not an import path: {hint}"
        known = sorted(kind.__name__ for kind in subclasses(base))
        hint = suggestion(match[1], known) or "a class of yours needs its module: mine.Name"
        if match[1] in known:  # from a file
            hint = f"give class_path: {match[1]} in the file"
        return f"{flag} {match[1]!r} is not one of {', '.join(known)}: {hint}"
    path = found.value if found.value and is_import_path(found.value) else found.owner
    return unknown_import(flag, path) if IMPORT_FAILED.search(found.reason) and is_import_path(path) else ""


def abstract_methods(path: str) -> list[str]:
    """Return the names of the methods that the class at an import path, or of this package, has to define."""
    module_name, _, name = path.rpartition(".")
    module = sys.modules.get(module_name or __package__.partition(".")[0])
    return sorted(getattr(getattr(module, name, None), "__abstractmethods__", ()))


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
    if name == "py":
        return f"{flag} {path!r} is a file: give a name in it, such as {module_name}.reward"
    public = public_names(module_name)
    hint = suggestion(name, public) or f"it has {', '.join(sorted(public)[:8])}{', ...' * (len(public) > 8)}"
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
    if known := OTHER_NAMES.get(name.rpartition(".")[2]):
        return f"{problem}: did you mean --{known}?"
    near = nearest_option(name, own, cutoff=0.6)
    near = f"{prefix}{near}" if near else nearest_option(f"{prefix}{name}", list(owners), cutoff=0.8)
    return f"{problem}: did you mean --{near}?" if near else problem


def wrong_value(first: Rejection, found: Iterable[Rejection]) -> str:
    """Return the sentence for a value of a wrong type, or else for what the parser says."""
    expected = [match[1] for rejection in found if (match := re.match(r"Expected (?:an? )?(.*)", rejection.reason))]
    value = "" if first.value is None or "Namespace(" in first.value else f" {shortened(first.value)!r}"
    if re.match(r"\W*lambda\b", first.value or ""):
        return f"--{first.option} takes no lambda: write a function in a file and give its import path: mine.reward"
    if expected and first.reason.startswith("Expected") and not any(re.match(p, first.reason) for p in REWORDED):
        kinds = [re.sub(r"<class '(?:.*\.)?(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", kind) for kind in expected]
        kinds = [kind for kind in kinds if not kind.startswith("dot import path")] or ["an import path"]
        hints = {
            "list": f": to add one, use --{first.option}+=VALUE",
            "Sequence": ": put it in brackets, such as [1, 2]",
        }
        hint = hints.get(kinds[0], "") if len(set(kinds)) == 1 else ""
        return f"--{first.option}{value}: expected {' or '.join(dict.fromkeys(kinds))}{hint}"
    reason = " ".join(first.reason.split())
    for pattern, words in REWORDED.items():
        reason = re.sub(f"^{pattern}", words, reason)
    return f"--{first.option}{value}: {reason}" if first.option else reason


def shortened(text: str, length: int = 80) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= length else f"{text[:length]}..."


def nearest_option(name: str, known: Sequence[str], cutoff: float) -> str:
    """Return the known option with the same last part, the one abbreviated or of similar spelling, or nothing."""
    last = name.rpartition(".")[2]
    same = [option for option in known if option.rpartition(".")[2] == last]
    same = same or [option for option in known if option.startswith(name)]  # an abbreviation
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


def public_names(module: str) -> list[str]:
    """Return the names that a module offers."""
    found = importlib.import_module(module)
    names = (name for name, value in vars(found).items() if not name.startswith("_") and not inspect.ismodule(value))
    return list(getattr(found, "__all__", None) or names)


def nearest_path(name: str, known: Sequence[str]) -> str:
    """Return "did you mean module.Name?" for the import path whose last part is most similar, or nothing."""
    last = {path.rpartition(".")[2]: path for path in reversed(known)}
    part_of = [path for own, path in last.items() if len(name) > 2 and name.lower() in own.lower()]
    if len(part_of) == 1:
        return f"did you mean {part_of[0]}?"
    close = difflib.get_close_matches(name, last, 1, cutoff=0.7)
    return f"did you mean {last[close[0]]}?" if close else ""


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return "did you mean X?" for the most similar name, or nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else ""


def subclasses(base: type) -> set[type]:
    """Return all concrete classes below a class that have been imported."""
    children: list[type] = base.__subclasses__()
    below = {kind for child in children for kind in {child} | subclasses(child)}
    return {kind for kind in below if not inspect.isabstract(kind)}
