"""The methods, one file each."""

from lit_rlhf.algorithms.base import Method
from lit_rlhf.algorithms.online import Online
from lit_rlhf.algorithms.reinforce import Reinforce
from lit_rlhf.algorithms.reward_model import RewardModeling
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.algorithms.sft import SFT

__all__ = ["RLOO", "SFT", "Method", "Online", "Reinforce", "RewardModeling"]
