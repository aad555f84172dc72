"""Align language models with human feedback, as PyTorch Lightning modules."""

from lit_rlhf import callbacks, functional, rewards
from lit_rlhf.algorithms import (
    DPO,
    IPO,
    PPO,
    RAFT,
    RLOO,
    SFT,
    Algorithm,
    OnlineAlgorithm,
    Reinforce,
    RewardModeling,
    VanillaPG,
)
from lit_rlhf.data import DemonstrationData, PreferenceData, PromptData
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.rewards import RewardModel, Weighted
from lit_rlhf.training.schedules import Warmup
from lit_rlhf.types import Completions, Demonstrations, Preferences, Prompts, Rollout

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "IPO",
    "PPO",
    "RAFT",
    "RLOO",
    "SFT",
    "Algorithm",
    "Completions",
    "DemonstrationData",
    "Demonstrations",
    "OnlineAlgorithm",
    "Policy",
    "PreferenceData",
    "Preferences",
    "PromptData",
    "Prompts",
    "Reinforce",
    "RewardModel",
    "RewardModeling",
    "Rollout",
    "Sampling",
    "VanillaPG",
    "Warmup",
    "Weighted",
    "callbacks",
    "functional",
    "rewards",
]
