"""Language models: policies, references, critics and reward models; how they sample, score, load and save."""

from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.sampling import Sampling

__all__ = ["Policy", "Reference", "Sampling"]
