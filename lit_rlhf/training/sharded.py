"""What an algorithm does where its models are sharded over ranks: shard them, gather them, export them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lit_rlhf.errors import InputError
from lit_rlhf.models.export import rebuild
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.scalar import ScalarModel
from lit_rlhf.models.sharding import ShardedWeights, Sharding
from lit_rlhf.training.checkpointing import CheckpointHooks
from lit_rlhf.training.strategies import FSDP2Strategy


class ShardingHooks(CheckpointHooks):
    """Mixin of `lit_rlhf.Algorithm` for a strategy that shards its models."""

    merges_adapter = False
    """Whether an export merges an adapter into its base model."""

    def shard_models(self, sharding: Sharding) -> None:
        """Shard the models over ranks, after all of them are loaded.

        Raises:
            ValueError: If a subclass overrides how a model is saved where it is whole only.
        """
        own = {name: getattr(self, name).__module__.startswith("lit_rlhf.") for name in ("save_model", "rebuild_model")}
        if own["rebuild_model"] and not own["save_model"]:
            raise InputError(
                f"{type(self).__name__} overrides save_model, which can't write a sharded model: override "
                "rebuild_model(weights, folder), too, or use --trainer.strategy ddp"
            )
        for module in self.children():
            if isinstance(module, Policy | ScalarModel):
                module.shard(sharding)
            elif any(p.requires_grad for p in module.parameters()) and not isinstance(module, FSDPModule):
                ShardedWeights(module, sharding)
        if isinstance(reference := vars(self).get("reference"), Reference):
            reference.shard(sharding)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold all weights on every rank within this context, if they are sharded. Enter it on all ranks."""
        with contextlib.ExitStack() as stack:
            for module in self.children():
                if isinstance(module, Policy | ScalarModel):
                    stack.enter_context(module.model_forward.gathered())
            yield

    def gathered_weights(self) -> dict[str, Tensor] | None:
        """Return the weights of an export, on the CPU of rank 0; None if they are not sharded. Call it on all ranks."""
        strategy, prefix = self.trainer.strategy, self.export_prefix
        if not isinstance(strategy, FSDP2Strategy):
            return None
        self._snapshot = self._snapshot or self.export_snapshot()
        state = strategy.whole_on_rank_zero(self.saved_weights(self.state_dict()))
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def rebuild_model(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the files of the model from gathered weights into a folder."""
        assert self._snapshot is not None
        rebuild(self._snapshot, weights, folder, merging=self.merges_adapter)
