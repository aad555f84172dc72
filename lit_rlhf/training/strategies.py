"""Strategies: how the weights of a run are placed on its devices."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer

from lit_rlhf.errors import InputError
from lit_rlhf.models.pretrained import without_weights
from lit_rlhf.models.sharding import Sharding, is_sharded, sharded_like, whole
from lit_rlhf.models.shards import SHARDS, check_shards, folder_of, read_shards
from lit_rlhf.training.checkpoint_files import check_file, check_on_all_ranks, read_checkpoint
from lit_rlhf.training.shard_files import remove_unnamed, write_shards


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallel training: weights, gradients and optimizer state are split over all ranks.

    `--trainer.strategy fsdp2`. Policy, reference and critic are sharded, a group of weights per decoder layer. A model
    is gathered on every rank while it samples or scores. Checkpoints are single files, like those of one device, or by
    choice have a folder into which each rank writes its shards.

    Args:
        gather: Whether a whole model is gathered on every rank while it samples or scores. Without, all ranks compute
            in step, layer by layer, which is slower and needs the memory of a layer only.
        save_distributed_checkpoint: Whether each rank writes its shards into a folder beside the checkpoint, instead of
            sending them to the first rank, which then holds all of them in main memory. All machines need to share the
            disk.
        timeout: See `lightning.pytorch.strategies.DDPStrategy`.
        process_group_backend: See there.
    """

    def __init__(
        self,
        gather: bool = True,
        save_distributed_checkpoint: bool = False,
        timeout: timedelta | None = default_pg_timeout,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.gather = gather
        self.sharding: Sharding | None = None
        self._resumed_folder: Path | None = None

    def setup_environment(self) -> None:
        """Start the processes; all of them share the weights, and each has its own data."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()
        # torch caches the mesh with sharded operations, and so keeps its process groups alive
        atexit.register(getattr(self.device_mesh, "_pg_registry", {}).clear)

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Load models within this context; only rank 0 reads their weights."""
        with super().model_sharded_context(), without_weights(not self.is_global_zero):
            yield

    def setup(self, trainer: Trainer) -> None:
        """Shard the models that the algorithm has loaded.

        Raises:
            ValueError: If the strategy does not synchronize a trainable parameter.
        """
        algorithm: Any = self.lightning_module
        if not self.gather and getattr(getattr(algorithm, "sampling", None), "batch_size", None):
            raise InputError(
                "sampling.batch_size splits a rollout on each rank apart, and with gather=false all ranks sample in "
                "step: lower data.batch_size instead"
            )
        self.sharding = Sharding(self.device_mesh["data_parallel"], self._precision(), self.gather)
        algorithm.shard_models(self.sharding)
        check_sharded(algorithm.named_parameters())
        super().setup(trainer)

    def _precision(self) -> MixedPrecisionPolicy:
        plugin = self.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.precision == "bf16-mixed":
            bf16, float32 = torch.bfloat16, torch.float32
            return MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=float32, cast_forward_inputs=False)
        return MixedPrecisionPolicy()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights that a checkpoint holds: this rank's shards, or all of them. Call it on all ranks."""
        algorithm: Any = self.lightning_module
        weights = algorithm.saved_weights(algorithm.state_dict())
        return dict(weights) if self._save_distributed_checkpoint else self.whole_on_rank_zero(weights)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer: this rank's shards, or all of it. Call it on all ranks."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state = optimizer.state_dict()
        saved = dict if self._save_distributed_checkpoint else self.whole_on_rank_zero
        return {**state, "state": {key: saved(values) for key, values in state["state"].items()}}

    def whole_on_rank_zero(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values with whole tensors on the CPU of rank 0, one after another; nothing on other ranks."""
        gathered = {}
        for name, value in values.items():
            full = whole(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                gathered[name] = full.cpu() if isinstance(full, Tensor) else full
        return gathered

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, and its shards if they are in a folder. Call it on all ranks.

        Raises:
            OSError: If it can't be written; the previous checkpoint is kept.
        """
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            assert self.sharding is not None
            write_shards(checkpoint, path, self.sharding)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
            remove_unnamed(path)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint with its folder."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            remove_unnamed(Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Map a checkpoint into memory, of which every rank then copies its shards; rank 0 checks every byte."""
        path = Path(checkpoint_path)
        check_on_all_ranks(path)
        damage, checkpoint = None, {}
        try:
            checkpoint = read_checkpoint(path, weights_only=weights_only is not False, mmap=True)
            if self.is_global_zero:
                check_file(path)
            check_shards(checkpoint, path, every_byte=self.is_global_zero)
        except InputError as error:
            damage = str(error)
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, damage)
        if damage := next(filter(None, found), None):
            raise InputError(damage)
        self._resumed_folder = folder_of(checkpoint, path) if SHARDS in checkpoint else None
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's shards of the weights of a checkpoint."""
        assert self.lightning_module is not None
        state, targets = checkpoint["state_dict"], self.lightning_module.state_dict(keep_vars=True)
        known = {name: (value, targets[name]) for name, value in state.items() if name in targets}
        self.lightning_module.load_state_dict(self._shards("state_dict", known), strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores optimizers, by `load_optimizer_state_dict`."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's shards of the optimizer states of a checkpoint."""
        for i, (optimizer, state) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            sharded = {}
            for key, values in state["state"].items():
                tensors = {n: (v, parameters[key] if v.ndim else v) for n, v in values.items() if isinstance(v, Tensor)}
                sharded[key] = {**values, **self._shards(f"optimizer_states/{i}/{key}", tensors)}
            optimizer.load_state_dict({**state, "state": sharded})

    def _shards(self, part: str, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return this rank's shards of a part of the checkpoint.

        Args:
            part: The name of the part.
            tensors: Tensors of the checkpoint, each with one that is sharded as it is to be.
        """
        if self._resumed_folder is None:
            return {name: sharded_like(value, target) for name, (value, target) in tensors.items()}
        shards = {
            name: torch.empty_like(target.detach(), dtype=value.dtype, device=None if is_sharded(target) else "cpu")
            for name, (value, target) in tensors.items()
        }
        read_shards({f"{part}/{name}": shard for name, shard in shards.items()}, self._resumed_folder)
        return shards


def check_sharded(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that the strategy synchronizes every trainable parameter.

    Raises:
        ValueError: If one is not sharded: each rank would train its own.
    """
    apart = [name for name, p in parameters if p.requires_grad and not is_sharded(p)]
    if apart:
        raise InputError(
            f"the parameter {apart[0]!r} ({len(apart)} in all) is trainable but not sharded, so each rank would train "
            "its own: make it part of a submodule of the algorithm that configure_model creates, or use "
            "--trainer.strategy ddp"
        )


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallel training (FSDP2)")
