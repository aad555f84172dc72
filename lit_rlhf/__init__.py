"""Align language models with human feedback, as PyTorch Lightning modules."""

from lit_rlhf import callbacks, functional, rewards
from lit_rlhf.algorithms import (
    CISPO,
    DAPO,
    DPO,
    GRPO,
    GSPO,
    IPO,
    KTO,
    OPO,
    PPO,
    RAFT,
    RLOO,
    SFT,
    Algorithm,
    DrGRPO,
    OnlineAlgorithm,
    OnlineDPO,
    PolicyGradient,
    Reinforce,
    ReinforceBatchMean,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    ReMax,
    RewardModeling,
    VanillaPG,
)
from lit_rlhf.data import DemonstrationData, PreferenceData, PromptData
from lit_rlhf.engines import Engine
from lit_rlhf.evaluation import EvaluationOptions
from lit_rlhf.models import Policy, Sampling
from lit_rlhf.rewards import RewardModel, RewardShaping, Weighted
from lit_rlhf.training import DynamicSampling, Importance, Updates, Warmup
from lit_rlhf.types import Completions, Demonstrations, Preferences, Prompts, Rollout

__version__ = "0.1.0"

__all__ = [
    "CISPO",
    "DAPO",
    "DPO",
    "GRPO",
    "GSPO",
    "IPO",
    "KTO",
    "OPO",
    "PPO",
    "RAFT",
    "RLOO",
    "SFT",
    "Algorithm",
    "Completions",
    "DemonstrationData",
    "Demonstrations",
    "DrGRPO",
    "DynamicSampling",
    "Engine",
    "EvaluationOptions",
    "Importance",
    "OnlineAlgorithm",
    "OnlineDPO",
    "Policy",
    "PolicyGradient",
    "PreferenceData",
    "Preferences",
    "PromptData",
    "Prompts",
    "ReMax",
    "Reinforce",
    "ReinforceBatchMean",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
    "RewardModel",
    "RewardModeling",
    "RewardShaping",
    "Rollout",
    "Sampling",
    "Updates",
    "VanillaPG",
    "Warmup",
    "Weighted",
    "callbacks",
    "functional",
    "rewards",
]
