"""The methods, one file each."""

from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.algorithms.dpo import DPO, IPO
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
    "IPO",
    "PPO",
    "RAFT",
    "RLOO",
    "SFT",
    "Algorithm",
    "OnlineAlgorithm",
    "Reinforce",
    "RewardModeling",
    "VanillaPG",
]
