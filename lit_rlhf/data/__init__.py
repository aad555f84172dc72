"""Data modules for prompts, demonstrations and preferences: reading, tokenization, resumable loading."""

from lit_rlhf.data.formats import Example, read_demonstration, read_preference, read_prompt
from lit_rlhf.data.module import DemonstrationData, PreferenceData, PromptData, TextData
from lit_rlhf.data.procedural import ReasoningGym
from lit_rlhf.data.sampler import BlockSampler, EvalSampler, ResumableLoader
from lit_rlhf.data.sources import load_rows
from lit_rlhf.data.transforms import AsChat, FirstWords, LastAnswer

__all__ = [
    "AsChat",
    "BlockSampler",
    "DemonstrationData",
    "EvalSampler",
    "Example",
    "FirstWords",
    "LastAnswer",
    "PreferenceData",
    "PromptData",
    "ReasoningGym",
    "ResumableLoader",
    "TextData",
    "load_rows",
    "read_demonstration",
    "read_preference",
    "read_prompt",
]
