"""What an algorithm does where an engine samples for it: give it the weights, and correct for what differs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.engines import Engine, ServerSampler
from lit_rlhf.models.export import rebuild
from lit_rlhf.models.sampling import Sampler
from lit_rlhf.training.distributed import gather_over_ranks, raise_on_all_ranks
from lit_rlhf.training.sharded import ShardingHooks


class EngineHooks(ShardingHooks):
    """Mixin of `lit_rlhf.OnlineAlgorithm` for an engine that samples."""

    engine: Engine
    _server: ServerSampler | None = None
    _renewed_at = -1
    """Updates at the last renewal."""

    @property
    def sampler(self) -> Sampler:
        """What samples from the policy."""
        return self._server or self.policy

    def setup_engine(self) -> None:
        """Make the engine's client; its weights are renewed before they are used."""
        self._renewed_at = -1
        if self.engine.url is not None and self._server is None:
            self._server = ServerSampler(self.policy, self.engine)

    def renew_engine(self) -> None:
        """Give the engine the policy's weights, unless it has them. Call it on all ranks."""
        server, trainer = self._server, self.trainer
        if server is None or self._renewed_at == trainer.global_step:
            return
        weights = self.gathered_weights()

        def save(folder: Path) -> None:
            if weights is None:
                self.policy.save_whole(folder)
            else:
                assert self._snapshot is not None
                rebuild(self._snapshot, weights, folder, merging=True)

        with raise_on_all_ranks(trainer):
            if trainer.is_global_zero:
                server.renew(save)
        first = gather_over_ranks(trainer, {"folder": server.folder, "version": server.version})[0]
        server.use(**first)
        self._renewed_at = trainer.global_step

    def teardown(self, stage: str) -> None:
        """Remove the weights that were handed over."""
        super().teardown(stage)
        if self._server is not None:
            self._server.close()
            self._server = None
