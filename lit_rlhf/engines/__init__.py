"""Engines that sample completions in place of the policy's own sampler."""

from lit_rlhf.engines.options import Engine
from lit_rlhf.engines.sampler import ServerSampler

__all__ = ["Engine", "ServerSampler"]
