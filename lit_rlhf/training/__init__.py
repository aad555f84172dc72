"""Machinery of the training loop: checks, resume, collective operations, metrics, timing, optimization, validation."""

from lit_rlhf.training.dynamic_sampling import DynamicSampling
from lit_rlhf.training.importance import Importance
from lit_rlhf.training.schedules import Warmup
from lit_rlhf.training.updates import Updates

__all__ = ["DynamicSampling", "Importance", "Updates", "Warmup"]
