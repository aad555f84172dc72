"""Parsers of the command line: functions as commands, errors as one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from lightning.pytorch.cli import LightningArgumentParser

from lit_rlhf.cli.config_files import PROGRAM
from lit_rlhf.cli.errors import explain, option_names

T = TypeVar("T")


class CommandLineParser(LightningArgumentParser):
    """Parser that raises a `UsageError` with a suggestion instead of exiting."""

    args: list[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # --trainer.max_step is a mistake

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UsageError`."""
        if not self.exit_on_error:  # an inner parser, which jsonargparse tries for one of several types
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", self)
        program = parser.prog.replace(" [options]", "").replace("memory fit", "memory")  # which has fit's options
        raise explain(message, parser.args, program, option_names(parser)) from ex


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
