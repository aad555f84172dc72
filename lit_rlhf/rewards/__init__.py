"""Rewards. Any callable can be a reward; this package has ready-made ones and the scorer that calls them."""

from lit_rlhf.rewards.base import Reward, Weighted
from lit_rlhf.rewards.functions import ExactMatch, Length, RegexMatch, Repetition, to_text
from lit_rlhf.rewards.guard import Guarded
from lit_rlhf.rewards.http_reward import HTTPReward
from lit_rlhf.rewards.reward_model import RewardModel
from lit_rlhf.rewards.scorer import Scorer, Scores
from lit_rlhf.rewards.sentiment import Sentiment
from lit_rlhf.rewards.shaping import RewardShaping

__all__ = [
    "ExactMatch",
    "Guarded",
    "HTTPReward",
    "Length",
    "RegexMatch",
    "Repetition",
    "Reward",
    "RewardModel",
    "RewardShaping",
    "Scorer",
    "Scores",
    "Sentiment",
    "Weighted",
    "to_text",
]
