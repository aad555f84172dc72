"""Failures before the first step that options cause: one sentence instead of a traceback."""

from __future__ import annotations

import re
import signal
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_rlhf.cli.config_files import PROGRAM
from lit_rlhf.cli.errors import explain
from lit_rlhf.errors import input_error
from lit_rlhf.models.out_of_memory import is_out_of_memory

PACKAGE = Path(__file__).parent.parent
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
CALLBACKS = str(Path("lightning", "pytorch", "callbacks"))
MAX_LENGTH = 300
LESS_IN_A_STEP = (
    "train on fewer rows at a time by --trainer.accumulate_grad_batches N, with --model.updates.num_minibatches N (the "
    "same updates) for methods that sample and a smaller --data.batch_size for others; or on shorter ones, with "
    "--model.lora, or a smaller model"
)
LESS_FOR_MODELS = "the models don't fit: use smaller ones, or --model.load.dtype bfloat16 with --model.lora"


def failure(error: BaseException, args: Sequence[str]) -> str | None:
    """Return the sentence for an error that a command's input caused; None for one that needs its traceback.

    That is an error in the user's code, in this package, or during training. What another library raises while the
    options are turned into objects, or while the run is set up, is about an option; so are errors of Lightning's
    callbacks at any time.

    Args:
        error: What was raised.
        args: The command's arguments.
    """
    if (known := input_error(error)) is not None and not isinstance(error, RuntimeError):
        return str(known)
    if not isinstance(error, Exception) or any(
        not is_known(frame.filename) for cause in causes(error) for frame in frames_of(cause)
    ):
        return None
    if "gloo/transport" in str(error):
        return "another process of this run has ended or does not answer: its own message, if any, says why"
    frames = frames_of(error)
    if is_out_of_memory(error):
        in_a_step = any(frame.name == "_run_stage" for frame in frames)
        return f"{first_line(error)}: {LESS_IN_A_STEP if in_a_step else LESS_FOR_MODELS}"
    empty = [arg for arg in args if re.search(r"=(null|None|~)$", arg)]
    if "None" in str(error) and empty and "Does not validate" in str(error):
        return f"{empty[-1]}: this option needs a value"
    if re.search(r'Parser key "|Problem with given class_path', str(error)):  # found when the objects are built
        return explain(str(error), args, PROGRAM, ()).sentence
    about_options = isinstance(error, MisconfigurationException) or CALLBACKS in frames[-1].filename
    training = not about_options and any(frame.name == "_run_stage" for frame in frames)
    if training or not is_library(frames[-1].filename):
        return None
    text = " ".join(str(error).split()) or type(error).__name__
    text = f"{text[:MAX_LENGTH]}..." if len(text) > MAX_LENGTH else text
    place = f"{type(error).__name__} in {'/'.join(Path(frames[-1].filename).parts[-3:])}, line {frames[-1].lineno}"
    option = named_option(text, args)
    return f"{option}{': ' if option else ''}{text} ({place})"


def first_line(error: BaseException) -> str:
    """Return the first sentence of an error's message, or its name: those of CUDA have many."""
    return next(iter(re.split(r"(?<=[a-z])\.(?:\s|$)|\n", str(error)))) or type(error).__name__


def ending_signal(error: SystemExit) -> signal.Signals | None:
    """Return the signal that Lightning turned into an exit whose code says nothing of it; None for another exit."""
    if isinstance(error, SIGTERMException):
        return signal.SIGTERM
    return signal.SIGINT if isinstance(error.__context__, KeyboardInterrupt) else None


def unwrapped(error: Exception) -> BaseException:
    """Return the error in a user's code that jsonargparse has wrapped in all that it tried, or the error itself."""
    inner = [cause for cause in causes(error) if any(not is_known(f.filename) for f in frames_of(cause))]
    is_of_parser = "jsonargparse" in frames_of(error)[-1].filename
    return inner[-1] if inner and is_of_parser else error


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and those that led to it."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def frames_of(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of an error."""
    return list(traceback.extract_tb(error.__traceback__))


def is_library(filename: str) -> bool:
    """Return whether a file belongs to Python or an installed package other than this one."""
    return filename.startswith((*LIBRARIES, "<frozen", "<@")) and not filename.startswith(str(PACKAGE))


def is_known(filename: str) -> bool:
    """Return whether a file belongs to a library or to this package, and not to the user."""
    return is_library(filename) or filename.startswith(str(PACKAGE))


def named_option(text: str, args: Sequence[str]) -> str:
    """Return the option of the command line that a message is about, by its name or else its value, or nothing."""
    given = []
    for arg, following in zip(args, [*args[1:], "--"], strict=True):
        if arg.startswith("--"):
            option, separator, value = arg.partition("=")
            value = value if separator else following
            given.append((option, "" if value.startswith("--") else value))
    words = set(re.findall(r"[\w.+-]+", text))
    by_name = [pair for pair in given if pair[0].rpartition(".")[2].strip("-+") in words]
    by_value = [pair for pair in given if len(pair[1]) > 1 and pair[1] in words]
    return " ".join((by_name or by_value)[-1]).strip() if by_name or by_value else ""
