"""Callbacks: they read a module's public attributes and logged metrics; no algorithm depends on them."""

from lit_rlhf.callbacks.adaptive_kl import AdaptiveKL
from lit_rlhf.callbacks.checkpoint import PolicyCheckpoint
from lit_rlhf.callbacks.curves import Curves
from lit_rlhf.callbacks.gradient_noise import GradientNoise
from lit_rlhf.callbacks.growing_batch import AdaptiveBatch, BatchSchedule
from lit_rlhf.callbacks.kl_monitor import KLMonitor
from lit_rlhf.callbacks.predictions import PredictionWriter
from lit_rlhf.callbacks.progress import RLHFProgressBar
from lit_rlhf.callbacks.samples import SampleLogger
from lit_rlhf.callbacks.signals import SaveOnSignal
from lit_rlhf.callbacks.summary import Summary

__all__ = [
    "AdaptiveBatch",
    "AdaptiveKL",
    "BatchSchedule",
    "Curves",
    "GradientNoise",
    "KLMonitor",
    "PolicyCheckpoint",
    "PredictionWriter",
    "RLHFProgressBar",
    "SampleLogger",
    "SaveOnSignal",
    "Summary",
]
