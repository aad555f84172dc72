"""Parsers of the command line: shipped configurations by name, functions as commands, errors as one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lightning.pytorch.cli import LightningArgumentParser

from lit_rlhf.cli.errors import CONFIG_FLAGS, PROGRAM, UsageError, explain, option_names

CONFIGS = Path(__file__).parent.parent / "configs"

T = TypeVar("T")


class CommandLineParser(LightningArgumentParser):
    """Parser that raises a `UsageError` with a suggestion instead of exiting."""

    args: list[str]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UsageError`."""
        if not self.exit_on_error:  # an inner parser, which jsonargparse tries for one of several types
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", self)
        raise explain(message, parser.args, parser.prog.replace(" [options]", ""), option_names(parser)) from ex


def call_function(function: Callable[..., T], name: str, args: Sequence[str], **given: Any) -> T:
    """Parse the arguments of a function and call it.

    Args:
        function: Function whose type hints and docstring define the options.
        name: Name of the command.
        args: Command line arguments.
        given: Arguments of the function that aren't options.
    """
    description = (function.__doc__ or "").partition("\n")[0]
    parser = CommandLineParser(prog=f"{PROGRAM} {name}", description=description)
    parser.add_argument("-c", "--config", action="config", help="Path or name of a configuration.")
    parser.add_function_arguments(function, as_group=False, sub_configs=True, skip=set(given))
    options = parser.instantiate(parser.parse_args(args))
    del options["config"]
    return function(**options, **given)


def expand_configs(args: Sequence[str]) -> list[str]:
    """Replace the names of shipped configurations after `--config` by their paths."""
    expanded = []
    for previous, arg in zip(["", *args], args, strict=False):
        flag, separator, value = arg.partition("=")
        if separator and flag in CONFIG_FLAGS:
            expanded.append(f"{flag}={shipped_config(value)}")
        else:
            expanded.append(shipped_config(arg) if previous in CONFIG_FLAGS else arg)
    return expanded


def shipped_config(name: str) -> str:
    """Return the path of the shipped configuration with this name; a file or inline YAML is returned unchanged.

    Raises:
        UsageError: If it is neither.
    """
    if name.lstrip().startswith(("{", "[")) or Path(name).is_file():
        return name
    path = CONFIGS / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    if path.is_file() and path.is_relative_to(CONFIGS):
        return str(path)
    known = ", ".join(sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml")))
    raise UsageError(f"--config {name!r} is neither a file nor a shipped configuration ({known})")
