"""Rewards. Any callable can be a reward; this package has ready-made ones and the scorer that calls them."""

from lit_rlhf.rewards.base import Reward, Weighted
from lit_rlhf.rewards.chat_judge import ChatJudge
from lit_rlhf.rewards.functions import ExactMatch, Length, RegexMatch, Repetition, Zero, to_text
from lit_rlhf.rewards.guard import Guarded
from lit_rlhf.rewards.http_reward import HTTPReward
from lit_rlhf.rewards.reward_model import RewardModel
from lit_rlhf.rewards.scorer import Scorer, Scores
from lit_rlhf.rewards.sentiment import Sentiment
from lit_rlhf.rewards.shaping import RewardShaping
from lit_rlhf.rewards.verifiable import Format, MathAnswer, ReasoningGymScore, SoftOverlong

__all__ = [
    "ChatJudge",
    "ExactMatch",
    "Format",
    "Guarded",
    "HTTPReward",
    "Length",
    "MathAnswer",
    "ReasoningGymScore",
    "RegexMatch",
    "Repetition",
    "Reward",
    "RewardModel",
    "RewardShaping",
    "Scorer",
    "Scores",
    "Sentiment",
    "SoftOverlong",
    "Weighted",
    "Zero",
    "to_text",
]
