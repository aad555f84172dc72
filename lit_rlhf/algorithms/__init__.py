"""The methods, one file each, and their two bases."""

from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.algorithms.dpo import DPO, IPO
from lit_rlhf.algorithms.dr_grpo import DrGRPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.raft import RAFT
from lit_rlhf.algorithms.reinforce import Reinforce
from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.algorithms.vanilla_pg import VanillaPG

__all__ = [
    "DPO",
    "GRPO",
    "IPO",
    "PPO",
    "RAFT",
    "RLOO",
    "SFT",
    "Algorithm",
    "DrGRPO",
    "OnlineAlgorithm",
    "Reinforce",
    "RewardModeling",
    "VanillaPG",
]
