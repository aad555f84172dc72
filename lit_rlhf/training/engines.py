"""What an algorithm does where an engine samples for it: give it the weights, and let it rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from transformers import PreTrainedTokenizerBase

from lit_rlhf.engines import Engine, ServerSampler
from lit_rlhf.engines.launch import StartedServer
from lit_rlhf.engines.sampler import make_folder
from lit_rlhf.errors import InputError
from lit_rlhf.models.export import rebuild
from lit_rlhf.models.sampling import Sampler, Sampling
from lit_rlhf.training.distributed import gather_over_ranks, raise_on_all_ranks
from lit_rlhf.training.sharded import ShardingHooks
from lit_rlhf.training.updates import Updates


class EngineHooks(ShardingHooks):
    """Mixin of `lit_rlhf.OnlineAlgorithm` for an engine that samples."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    updates: Updates
    _server: ServerSampler | None = None
    _started: StartedServer | None = None
    _renewed_at = -1
    """Updates at the last renewal."""

    @property
    def sampler(self) -> Sampler:
        """What samples from the policy."""
        return self._server or self.policy

    def setup(self, stage: str) -> None:
        """Check the options.

        Raises:
            ValueError: If a server is to be started for several machines.
        """
        super().setup(stage)
        if self.engine.start is not None and self.trainer.num_nodes > 1:
            raise InputError("engine.start starts a server for one machine: start it yourself, and give engine.url")

    def setup_engine(self) -> None:
        """Make the engine's client, and start a server by choice; its weights are renewed before they are used."""
        self._renewed_at = -1
        if self._server is None and self.engine.start is not None:
            url = self._start_server()
            found = replace(self.engine, url=url, start=None, arguments=(), environment={})
            self._server = ServerSampler(self.policy, found, self._started)
        if self._server is None and self.engine.url is not None:
            self._server = ServerSampler(self.policy, self.engine)

    def _start_server(self) -> str:
        """Let the first rank start the server with the policy; return its address on all ranks."""
        trainer, save, found = self.trainer, self._saving(), ""
        log = Path(trainer.log_dir or trainer.default_root_dir) / "vllm.log"
        with raise_on_all_ranks(trainer):
            if trainer.is_global_zero:
                rank_zero_info(f"starting a vLLM server; its output is in {log}")
                folder = make_folder(self.engine)
                try:
                    save(folder)
                    self.tokenizer.save_pretrained(folder)
                    self._started = StartedServer(self.engine, folder, log)
                    self._started.wait()
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                found = self._started.url
        return str(gather_over_ranks(trainer, {"url": found})[0]["url"])

    def _saving(self) -> Callable[[Path], None]:
        """Return what writes the policy into a folder on the first rank. Call it on all ranks."""
        weights = self.gathered_weights()

        def save(folder: Path) -> None:
            if weights is None:
                self.policy.save_whole(folder)
            else:
                assert self._snapshot is not None
                rebuild(self._snapshot, weights, folder, merging=True)

        return save

    def renew_engine(self) -> None:
        """Wake the engine, and give it the policy's weights, unless it has them. Call it on all ranks."""
        server, trainer = self._server, self.trainer
        if server is None:
            return
        if self.engine.sleep:
            garbage_collection_cuda()  # PyTorch keeps what it has freed, and the server may be on the same device
            with raise_on_all_ranks(trainer):
                if trainer.is_global_zero:
                    server.server.wake()
        if self._renewed_at == trainer.global_step:
            return
        save = self._saving()
        with raise_on_all_ranks(trainer):
            if trainer.is_global_zero:
                server.renew(save)
        first = gather_over_ranks(trainer, {"folder": server.folder, "version": server.version})[0]
        server.use(**first)
        self._renewed_at = trainer.global_step

    def rest_engine(self) -> None:
        """Let the engine free its memory, by choice, after all ranks have sampled. Call it on all ranks."""
        if self._server is None or not self.engine.sleep:
            return
        with raise_on_all_ranks(self.trainer):
            if self.trainer.is_global_zero:
                self._server.server.sleep()

    def configure_callbacks(self) -> list[Any]:
        """Add what releases the engine if the run fails, where Lightning calls no `teardown` of a module."""
        inherited: Any = super().configure_callbacks()
        return [*inherited, *([ReleaseOnError(self.release_engine)] if self.engine.used else [])]

    def release_engine(self) -> None:
        """Remove the weights that were handed over, and end a server that was started."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._started is not None:
            self._started.stop()
            self._started = None

    def teardown(self, stage: str) -> None:
        """Release the engine."""
        super().teardown(stage)
        self.release_engine()


class ReleaseOnError(Callback):
    """Releases the engine of a run that fails.

    Args:
        release: Releases it.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self.release = release

    def on_exception(self, *args: Any) -> None:
        """Release it."""
        self.release()
