"""The configuration of a run, for the command line."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_rlhf.callbacks.utils import run_folder
from lit_rlhf.training.checkpoint_files import check_on_all_ranks


class RunConfig(SaveConfigCallback):
    """Write `config.yaml` into the run's folder, where Lightning's writes it into that of the first logger."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "overwrite": True})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, once; refuse a checkpoint that only some machines have."""
        check_on_all_ranks(self.config.get("ckpt_path"))
        folder = run_folder(trainer)
        if trainer.is_global_zero and not self.already_saved:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self.config_filename
            self.parser.save(self.config, path, skip_none=False, overwrite=self.overwrite, multifile=self.multifile)
            self.already_saved = True
