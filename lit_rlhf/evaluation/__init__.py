"""Evaluation on held-out prompts: the evaluator, its metrics, and judges that compare two completions."""

from lit_rlhf.evaluation.judges import PairJudge, SymmetricJudge

__all__ = ["PairJudge", "SymmetricJudge"]
