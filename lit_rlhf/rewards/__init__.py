"""Rewards: what a completion is worth. Any callable will do; these are ready-made."""

from lit_rlhf.rewards.base import Reward, Weighted
from lit_rlhf.rewards.functions import ExactMatch, Length, Matches, Repetition, text_of
from lit_rlhf.rewards.judge import BothOrders, PairJudge
from lit_rlhf.rewards.model import RewardModel
from lit_rlhf.rewards.scorer import Scorer, Scores
from lit_rlhf.rewards.sentiment import Sentiment
from lit_rlhf.rewards.shaping import Shaping

__all__ = [
    "BothOrders",
    "ExactMatch",
    "Length",
    "Matches",
    "PairJudge",
    "Repetition",
    "Reward",
    "RewardModel",
    "Scorer",
    "Scores",
    "Sentiment",
    "Shaping",
    "Weighted",
    "text_of",
]
