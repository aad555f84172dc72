"""The command line: `lit-rlhf fit | validate | test | predict` on Lightning's, and `lit-rlhf export`."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from transformers.utils.logging import disable_progress_bar

from lit_rlhf import __version__, callbacks
from lit_rlhf.algorithms import Algorithm
from lit_rlhf.comparison.runs import CellsFailed, compare
from lit_rlhf.data import TextData
from lit_rlhf.models.export import export_checkpoint

CONFIGS = Path(__file__).parent.parent / "configs"
PACKAGE = Path(__file__).parent.parent
PROGRAM = "lit-rlhf"
CONFIG_FLAGS = ("--config", "-c")
CALLBACKS: dict[str, type[Callback]] = {
    "checkpoint": callbacks.PolicyCheckpoint,
    "kl_monitor": callbacks.KLMonitor,
    "samples": callbacks.SampleLogger,
    "curves": callbacks.Curves,
    "predictions": callbacks.PredictionWriter,
}
DESCRIPTION = (
    "Align language models with human feedback. Beside the commands below, `lit-rlhf export` makes a model's folder of "
    "a checkpoint, and `lit-rlhf compare` runs several methods side by side; each has a --help of its own."
)
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class RLHFCommandLine(LightningCLI):
    """LightningCLI with the callbacks that every run has, each with options of its own, and a folder for each run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks."""
        for name, kind in CALLBACKS.items():
            parser.add_lightning_class_args(kind, name)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer; without a logger of the user's it logs to TensorBoard and `metrics.csv` in one folder."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            root = self._get(self.config_init, "trainer.default_root_dir") or "runs"
            tensorboard = TensorBoardLogger(root, name="")
            kwargs["logger"] = [tensorboard, CSVLogger(root, name="", version=tensorboard.version)]
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Build it without those callbacks that its flags switch off, which nobody has asked for."""
        kinds = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}
        off = tuple(kind for flag, kind in kinds.items() if config.get(flag) is False)
        defaults = self.trainer_defaults
        defaults["callbacks"] = [callback for callback in defaults["callbacks"] if not isinstance(callback, off)]
        return super()._instantiate_trainer(
            config, [callback for callback in callbacks if not isinstance(callback, off)]
        )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The arguments; those of the process where None.
    """
    given = expand_configs(list(sys.argv[1:] if args is None else args)) or ["--help"]
    if given == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return
    sys.path.insert(0, str(Path.cwd()))  # where a user's own methods and rewards are
    check_configs(given)
    check_class_names(given)
    silence_third_party_warnings()
    try:
        if given[:1] == ["compare"]:
            jsonargparse.auto_cli(compare, args=given[1:], as_positional=False, prog=f"{PROGRAM} compare")
        elif given[:1] == ["export"]:
            written = jsonargparse.auto_cli(
                export_checkpoint, args=given[1:], as_positional=False, prog=f"{PROGRAM} export"
            )
            print(f"wrote {written}")
        else:
            sys.argv[1:] = given  # where LightningCLI, and the processes that DDP starts, look
            run()
    except CellsFailed as error:
        sys.exit(f"{PROGRAM}: {error}")
    except KeyboardInterrupt:
        if given[:1] != ["compare"]:
            raise
        print(f"{PROGRAM}: interrupted; what is done stays, and the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, FileNotFoundError) as error:
        sentence = own_sentence(error)
        if sentence is None:
            raise
        print(f"{PROGRAM}: {sentence}", file=sys.stderr)
        sys.exit(1)


def parse_error(args: Sequence[str]) -> str | None:
    """Return what is wrong with the arguments of a command, as far as the parser can tell, or None.

    Args:
        args: The command and its arguments. Nothing is run or built.
    """
    before, said = sys.argv, io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            given = expand_configs(list(args))
            check_class_names(given)
            sys.argv = [PROGRAM, *given, "--print_config"]
            run()
    except SystemExit as stopped:
        if stopped.code in (0, None):
            return None
        return said.getvalue().rpartition("error: ")[2].strip() or str(stopped.code)
    finally:
        sys.argv = before
    return None


def run() -> None:
    """Run one of Lightning's commands, with the arguments of the process."""
    defaults = {
        "default_root_dir": "runs",
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,  # a full validation comes before the first update
        "callbacks": [callbacks.RLHFProgressBar(), callbacks.SaveOnSignal(), callbacks.Summary()],
    }
    options = "--config NAME [--model.OPTION VALUE] [--data.OPTION VALUE] [--trainer.OPTION VALUE] ..."
    usage = {name: {"usage": f"{PROGRAM} {name} {options}"} for name in ("fit", "validate", "test", "predict")}
    line = RLHFCommandLine(
        Algorithm,
        TextData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=1,
        auto_configure_optimizers=False,
        trainer_defaults=defaults,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": PROGRAM, "description": DESCRIPTION, **usage},
    )
    for callback in line.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, callbacks.SaveOnSignal) and callback.stopped is not None:
            sys.exit(128 + callback.stopped)  # as a shell tells it, so that nobody takes the run for a finished one


def expand_configs(args: list[str]) -> list[str]:
    """Replace the bare name of a shipped configuration after `--config` by its path."""
    expanded = []
    for previous, arg in zip(["", *args], args, strict=False):
        flag, separator, value = arg.partition("=")
        if separator and flag in CONFIG_FLAGS:
            expanded.append(f"{flag}={shipped_config(value)}")
        else:
            expanded.append(shipped_config(arg) if previous in CONFIG_FLAGS else arg)
    return expanded


def shipped_config(name: str) -> str:
    """Return the path of the configuration that ships under this name, or the name itself where it is a file.

    Raises:
        SystemExit: If it is neither; the message lists what ships.
    """
    if name.lstrip().startswith(("{", "[")) or Path(name).is_file():
        return name
    path = CONFIGS / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    if path.is_file() and path.is_relative_to(CONFIGS):
        return str(path)
    known = ", ".join(sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml")))
    sys.exit(f"{PROGRAM}: --config {name!r} is no file, and no configuration that ships has that name ({known})")


def given_flags(args: list[str]) -> Iterator[tuple[str, str]]:
    """Every argument as a value, with the flag that it stands behind: after `=`, or as the argument before."""
    for previous, arg in zip(["", *args], args, strict=False):
        flag, separator, value = arg.partition("=")
        yield (flag, value) if separator else (previous, arg)


def check_configs(args: list[str]) -> None:
    """Check that configurations are for the command that they are given to.

    Raises:
        SystemExit: If one is of a comparison and the command none, or the other way round.
    """
    compares = args[:1] == ["compare"]
    for flag, value in given_flags(args):
        path = Path(value)
        if flag not in CONFIG_FLAGS or path.suffix not in (".yaml", ".yml") or not path.is_file():
            continue
        try:
            keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            continue  # the parser says what is wrong
        if isinstance(keys, dict) and ("model" if compares else "cells") in keys:
            cure = "it is for fit, validate, test and predict" if compares else "it is for `lit-rlhf compare`"
            sys.exit(f"{PROGRAM}: --config {value!r} is not for {args[0]}: {cure}")


def check_class_names(args: list[str]) -> None:
    """Check names of classes and functions, where the parser would list all it tried.

    Raises:
        SystemExit: If there is nothing of that name.
    """
    bases: dict[str, type | None] = {"--model": Algorithm, "--data": TextData}
    bases |= dict.fromkeys(("--model.rewards+", "--model.rewards", "--model.judge"))
    for flag, value in given_flags(args):
        if flag == "--data" and value.endswith(DATA_SUFFIXES):
            sys.exit(f"{PROGRAM}: --data {value!r} is a file, and --data takes a class: did you mean --data.train?")
        named = all(part.isidentifier() for part in value.split("."))
        if flag not in bases or not named or Path(value).is_file():
            continue
        base = bases[flag]
        if "." in value:
            check_path(flag, value)
        elif base is not None:
            check_subclass(flag, value, base)


def check_subclass(flag: str, name: str, base: type) -> None:
    """Check a bare class name."""
    known = sorted(kind.__name__ for kind in subclasses(base) if not inspect.isabstract(kind))
    if name not in known:
        hint = suggestion(name, known) or "one of your own needs its module: mine.Name"
        sys.exit(f"{PROGRAM}: {flag} {name!r} is none of {', '.join(known)}: {hint}")


def check_path(flag: str, path: str) -> None:
    """Check `module.name`; what the import of a module raises comes through."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not module_name.startswith(error.name or module_name):
            raise
        sys.exit(
            f"{PROGRAM}: {flag} {path!r}: there is no module {error.name!r}, looked for in {str(Path.cwd())!r} too"
        )
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        hint = suggestion(name, public) or f"it has {', '.join(sorted(public)[:20])}"
        sys.exit(f"{PROGRAM}: {flag} {path!r}: the module {module_name!r} has no {name!r}: {hint}")


def suggestion(name: str, known: Sequence[str]) -> str:
    """Guess what was meant, or return nothing."""
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else ""


def subclasses(base: type) -> set[type]:
    """All classes below a class that have been imported."""
    children: list[type] = base.__subclasses__()
    return {kind for child in children for kind in {child} | subclasses(child)}


def own_sentence(error: BaseException | None) -> str | None:
    """Return what this package says in an error or in what led to it; a traceback would only bury that."""
    folders = [PACKAGE.resolve(), (PACKAGE / "callbacks").resolve()]
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        said = bool(frames) and (frames[-1].line or "").startswith("raise ")  # and is no slip of a subclass
        if said and any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in folders):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def silence_third_party_warnings() -> None:
    """Drop messages of other packages that users can do nothing about."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory .* exists")  # TensorBoard's, just made
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading and writing weights
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "litlogger" not in record.getMessage())
