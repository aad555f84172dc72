"""What an algorithm does to write the model that it trains."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from lit_rlhf.models.export import snapshot, write_folder
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.pretrained import resolve, shared_options
from lit_rlhf.training.distributed import raise_on_all_ranks
from lit_rlhf.training.sharded import ShardingHooks


class ExportHooks(ShardingHooks):
    """Mixin of `lit_rlhf.Algorithm` that exports its model."""

    pretrained: str
    load_options: dict[str, Any]

    def export(self, folder: str | Path) -> None:
        """Write the trained model as a folder that `transformers` or PEFT loads. Call it on all ranks."""
        weights = self.gathered_weights()
        save = self.save_model if weights is None else functools.partial(self.rebuild_model, weights)
        with raise_on_all_ranks(self.trainer):
            if self.trainer.is_global_zero:
                write_folder(Path(folder), save)

    def save_model(self, folder: Path) -> None:
        """Write the model's files into a folder."""
        self.policy.save(folder)

    def export_snapshot(self) -> dict[str, Any]:
        """Return everything that an export needs besides the weights."""
        model, policy = self._trained_model, self._modules.get("policy")
        own = self.pretrained and model.config.name_or_path == resolve(self.pretrained)
        options = self.load_options if own else shared_options(self.load_options)  # the base model of an adapter
        tokenizer = cast("PreTrainedTokenizerBase", self.tokenizer)
        if not isinstance(policy, Policy):
            return snapshot(model, tokenizer, {}, **options)
        return snapshot(model, tokenizer, policy.processor_files, not policy.loaded, **options)
