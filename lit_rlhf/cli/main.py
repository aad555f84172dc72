"""The command line: Lightning's `lit-rlhf fit | validate | test | predict`, and `export | compare | memory`."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers.utils.logging import disable_progress_bar

from lit_rlhf import __version__, callbacks
from lit_rlhf.algorithms import Algorithm
from lit_rlhf.callbacks.run_config import RunConfig
from lit_rlhf.cli.checkpoints import export, resolve_checkpoint
from lit_rlhf.cli.config_files import PROGRAM, UsageError, expand_configs
from lit_rlhf.cli.errors import COMMANDS
from lit_rlhf.cli.failures import ending_signal, failure, unwrapped
from lit_rlhf.cli.memory import MemoryReport
from lit_rlhf.cli.parser import CommandLineParser, call_function
from lit_rlhf.cli.run_files import give_folder, place_loggers
from lit_rlhf.comparison.compare import RunsFailed, compare
from lit_rlhf.data import TextData
from lit_rlhf.errors import InputFileNotFoundError
from lit_rlhf.rewards.base import RewardInterrupted
from lit_rlhf.training.checks import check_processes
from lit_rlhf.training.files import release_if_empty

CALLBACKS: dict[str, type[Callback]] = {
    "checkpoint": callbacks.PolicyCheckpoint,
    "kl_monitor": callbacks.KLMonitor,
    "samples": callbacks.SampleLogger,
    "curves": callbacks.Curves,
    "predictions": callbacks.PredictionWriter,
}
DEFAULT_ROOT = "runs"
DESCRIPTION = (
    "Align language models with human feedback. Three more commands have a --help of their own: `lit-rlhf export` "
    "writes the model of a checkpoint to a folder, `lit-rlhf compare` runs several methods side by side, and `lit-rlhf "
    "memory` takes the options of `fit` and says what the run will hold in memory."
)


class RLHFCommandLine(LightningCLI):
    """LightningCLI with a configurable set of default callbacks, one folder per run, and checkpoints that are data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the default callbacks."""
        for name, kind in CALLBACKS.items():
            parser.add_lightning_class_args(kind, name)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the command that was given, or else all of Lightning's: the options of each take time to set up.

        A checkpoint is read as data, so there is no option `weights_only`.
        """
        every = {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()}
        return {name: skip for name, skip in every.items() if [name] == sys.argv[1:2]} or every

    def _parse_ckpt_path(self) -> None:
        """Resolve `--ckpt_path`; nothing in the checkpoint reaches the configuration, where Lightning merges it."""
        command = self.config["subcommand"]
        options = self.config[command]
        options.trainer.default_root_dir = options.trainer.default_root_dir or DEFAULT_ROOT
        root = Path(options.trainer.default_root_dir).expanduser()
        place_loggers(options.trainer.logger, root)
        if options.ckpt_path is not None:
            try:
                found = resolve_checkpoint(str(options.ckpt_path), root, may_be_missing=command == "fit")
            except InputFileNotFoundError:
                if options.trainer.num_nodes == 1:
                    raise
                found = Path(str(options.ckpt_path)).expanduser()  # refused on all machines together
            options.ckpt_path = None if found is None else str(found)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Read checkpoints as data."""
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Create the Trainer and its folder; its default loggers are TensorBoard and `metrics.csv`."""
        default_loggers = self._get(self.config_init, "trainer.logger") in (None, True)
        trainer = super().instantiate_trainer(**kwargs, **({"logger": False} if default_loggers else {}))
        check_processes(
            trainer.strategy, trainer.num_devices * trainer.num_nodes, trainer.num_devices, trainer.num_nodes
        )
        self.folder = give_folder(
            trainer, "version" if self.subcommand == "fit" else str(self.subcommand), default_loggers
        )
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; a run that could not start leaves no empty folder."""
        try:
            super()._run_subcommand(subcommand)
        finally:
            if self.folder is not None:
                release_if_empty(self.folder)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Create it without the default callbacks that the Trainer's flags disable."""
        kinds = {"enable_progress_bar": ProgressBar, "enable_checkpointing": Checkpoint}
        disabled = tuple(kind for flag, kind in kinds.items() if config.get(flag) is False)
        defaults = self.trainer_defaults
        defaults["callbacks"] = [callback for callback in defaults["callbacks"] if not isinstance(callback, disabled)]
        return super()._instantiate_trainer(
            config, [callback for callback in callbacks if not isinstance(callback, disabled)]
        )


class MemoryCommandLine(RLHFCommandLine):
    """Command line of `fit` that prints what the run will hold in memory, and runs nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of this command."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--device_memory", type=PositiveFloat | None, help="Memory of a device in GiB.")
        for name in ("prompt", "completion"):
            parser.add_argument(
                f"--{name}_tokens", type=PositiveInt | None, help=f"Longest {name}; by default that of the options."
            )

    def instantiate_trainer(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Create none: its devices may be on another machine."""

    def _run_subcommand(self, subcommand: str) -> None:
        MemoryReport(self.model, self.datamodule, self.config_init[subcommand]).print()  # type: ignore[arg-type]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; those of the process if None.

    Raises:
        SystemExit: With code 2 if the arguments can't be parsed, 1 if a run can't work with them, and 128 + number if a
            signal ended it: 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
    if arguments == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return
    sys.path.insert(0, str(Path.cwd()))  # for the user's own algorithms and rewards
    silence_third_party_warnings()
    try:
        run_command(expand_configs(arguments))
    except UsageError as error:
        print(f"{PROGRAM}: {error.sentence}", error.tip, sep="\n" if error.tip else "", file=sys.stderr)
        sys.exit(2)
    except RunsFailed as error:
        sys.exit(f"{PROGRAM}: {error}")
    except KeyboardInterrupt:
        kept = "; finished runs are kept, and the same command resumes" if arguments[0] == "compare" else ""
        print(f"{PROGRAM}: interrupted{kept}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as error:
        if (number := ending_signal(error)) is None:
            raise
        sys.exit(128 + number)
    except RewardInterrupted as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        sys.exit(128 + error.number)
    except Exception as error:
        known = failure(error, arguments)
        if known is None:
            cause = unwrapped(error)
            if cause is error:
                raise
            raise cause from cause.__cause__
        print(f"{PROGRAM}: {known}", file=sys.stderr)
        sys.exit(1)


def run_command(args: list[str]) -> None:
    """Run a command with its arguments."""
    if args[0] == "compare":
        call_function(compare, "compare", args[1:], parse_error=parse_error)
    elif args[0] == "export":
        print(f"wrote {call_function(export, 'export', args[1:])}")
    elif args[0] == "memory":
        command_line(MemoryCommandLine, ["fit", *args[1:]], "memory")
    elif args[0].startswith("-") and (command := next((arg for arg in args if arg in COMMANDS), None)):
        raise UsageError(f"the command comes first: {PROGRAM} {command} {args[0]} ...")
    else:
        run_lightning(args)


def command_line(kind: type[RLHFCommandLine], args: list[str], called: str = "") -> RLHFCommandLine:
    """Parse the arguments of one of Lightning's commands, which may be called by another name, and run it."""
    sys.argv[1:] = args  # read by LightningCLI and by the processes that DDP starts
    defaults = {
        "default_root_dir": DEFAULT_ROOT,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,  # a full validation runs before the first update
        "enable_model_summary": False,  # `Summary` prints the number of trained weights
        "callbacks": [callbacks.RLHFProgressBar(), callbacks.SaveOnSignal(), callbacks.Summary()],
    }
    options = "--config NAME [--model.OPTION VALUE] [--data.OPTION VALUE] [--trainer.OPTION VALUE] ..."
    usage = {name: {"usage": f"{PROGRAM} {called or name} {options}"} for name in kind.subcommands()}
    return kind(
        Algorithm,
        TextData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=1,
        auto_configure_optimizers=False,
        trainer_defaults=defaults,
        save_config_callback=RunConfig,
        parser_class=CommandLineParser,
        parser_kwargs={"prog": f"{PROGRAM} {called}".strip(), "description": DESCRIPTION, **usage},
    )


def run_lightning(args: list[str]) -> None:
    """Run one of Lightning's commands."""
    line = command_line(RLHFCommandLine, args)
    for callback in line.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, callbacks.SaveOnSignal) and callback.stopped is not None:
            sys.exit(128 + callback.stopped)  # the shell's convention: the run isn't finished
    for callback in line.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, callbacks.PolicyCheckpoint) and callback.unwritten.reasons:
            sys.exit(f"{PROGRAM}: the run is complete, but not written: {callback.unwritten}")


def parse_error(args: Sequence[str]) -> str | None:
    """Return why a command line can't be parsed, or None; nothing is built or run.

    Args:
        args: The command and its arguments.
    """
    previous = sys.argv[1:]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run_lightning([*expand_configs(args), "--print_config"])
    except UsageError as error:
        return error.sentence
    except SystemExit:  # the configuration was printed
        return None
    finally:
        sys.argv[1:] = previous
    return None


def silence_third_party_warnings() -> None:
    """Hide messages of other packages that users can't act on."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory .* exists")  # TensorBoard just created it
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading and writing weights
    noise = ("litlogger", "TPU available", "Loading `train_dataloader`")
    infos = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    infos.addFilter(lambda record: not any(text in record.getMessage() for text in noise))
