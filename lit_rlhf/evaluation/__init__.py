"""Evaluation on held-out prompts: options, the evaluator, its metrics, and judges that compare two completions."""

from lit_rlhf.evaluation.judges import PairJudge, SymmetricJudge
from lit_rlhf.evaluation.options import EvaluationOptions

__all__ = ["EvaluationOptions", "PairJudge", "SymmetricJudge"]
