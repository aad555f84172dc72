"""Side concerns of a run: they see a module's public attributes and what it logs, and no method knows them."""

from .checkpoint import PolicyCheckpoint
from .curves import Curves
from .kl_monitor import KLMonitor
from .progress import RLHFProgressBar
from .samples import SampleLogger
from .signals import SaveOnSignal
from .summary import Summary

__all__ = ["Curves", "KLMonitor", "PolicyCheckpoint", "RLHFProgressBar", "SampleLogger", "SaveOnSignal", "Summary"]
