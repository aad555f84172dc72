"""The methods, one file each, and their bases."""

from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.algorithms.batch_mean import ReinforceBatchMean
from lit_rlhf.algorithms.cispo import CISPO
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.dpo import DPO, IPO
from lit_rlhf.algorithms.dr_grpo import DrGRPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.kto import KTO
from lit_rlhf.algorithms.offline import OfflineAlgorithm
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.algorithms.online_dpo import OnlineDPO
from lit_rlhf.algorithms.opo import OPO
from lit_rlhf.algorithms.policy_gradient import PolicyGradient
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.raft import RAFT
from lit_rlhf.algorithms.ranking import RankingAlgorithm
from lit_rlhf.algorithms.reinforce import Reinforce
from lit_rlhf.algorithms.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusBaseline
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.algorithms.unpaired import UnpairedAlgorithm
from lit_rlhf.algorithms.vanilla_pg import VanillaPG

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
    "DrGRPO",
    "OfflineAlgorithm",
    "OnlineAlgorithm",
    "OnlineDPO",
    "PolicyGradient",
    "RankingAlgorithm",
    "ReMax",
    "Reinforce",
    "ReinforceBatchMean",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
    "RewardModeling",
    "UnpairedAlgorithm",
    "VanillaPG",
]
