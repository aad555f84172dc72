"""Whether the options of a run fit together, found out before its first step, with a sentence where they don't."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rlhf.data.sampler import ResumableLoader
from lit_rlhf.evaluation.evaluator import check_completions, check_opponent
from lit_rlhf.evaluation.judges import SymmetricJudge
from lit_rlhf.rewards import Scorer, Weighted
from lit_rlhf.types import Demonstrations, Preferences, Prompts, Record

if TYPE_CHECKING:
    from lit_rlhf.algorithms.base import Algorithm
    from lit_rlhf.algorithms.online import OnlineAlgorithm
    from lit_rlhf.data import TextData

T = TypeVar("T")


def make_options(kind: type[T], argument: str, options: dict[str, Any] | None, **given: Any) -> T:
    """Build a record from the options that `argument` holds and fields given elsewhere.

    Raises:
        ValueError: If there is no such option, or its place is elsewhere.
    """
    if twice := sorted(given.keys() & (options or {}).keys()):
        raise ValueError(f"{argument}={options}: {', '.join(twice)} stands beside `{argument}`, not in it")
    try:
        return kind(**given, **(options or {}))
    except TypeError as error:
        known = f"{kind.__module__}.{kind.__name__}"
        raise ValueError(f"{argument}={options}: {error}; its options are those of {known}") from error


def make_judge(judge: Callable[..., Any]) -> Scorer | SymmetricJudge:
    """Take a judge that scores one completion, or compares two."""
    bare = judge
    while isinstance(bare, Weighted):
        bare = bare.reward
    pairwise = getattr(bare, "pairwise", getattr(getattr(bare, "func", None), "pairwise", False))
    return SymmetricJudge(bare) if pairwise else Scorer([judge], "judge")


DATA: dict[type[Record], str] = {
    Prompts: "PromptData",
    Demonstrations: "DemonstrationData",
    Preferences: "PreferenceData",
}
"""The data module that yields each record."""

WRONG_KL = {
    "k1_loss": "its gradient is 0 on average, so nothing holds the policy",
    "k2_reward": "its gradient is not that of the KL",
    "k3_reward": "its gradient is not that of the KL, and can point the other way",
    "k3_loss": "its gradient is that of KL(reference || policy), not of KL(policy || reference)",
}
"""Places of an estimator of the KL where it does not do what one expects, and what it does instead."""


def read_kl_penalty(kl_penalty: str) -> tuple[str, str]:
    """Return estimator and place of the KL, with a warning for a pair whose gradient is not that of the KL.

    Raises:
        ValueError: If there is no such pair.
    """
    known = ["k1_reward", "k2_loss", *WRONG_KL]
    if kl_penalty not in known:
        raise ValueError(f"kl_penalty={kl_penalty!r} must be one of {', '.join(known)}")
    if kl_penalty in WRONG_KL:
        rank_zero_warn(f"kl_penalty={kl_penalty!r}: {WRONG_KL[kl_penalty]}; k1_reward and k2_loss are exact")
    estimator, _, place = kl_penalty.partition("_")
    return estimator, place


def check_columns(module: OnlineAlgorithm, data: TextData) -> None:
    """Raise a ValueError if the data lack a column that a reward, the judge or the opponent asks for."""
    train, val = data.columns("train"), data.columns("val")
    for columns in (train, val):
        if columns is not None:
            module.scorer.check(columns)
    if val is not None:
        module.judge.check(val)
        check_opponent(module.opponent, val)
        if module.evaluation.preferred is not None:
            check_completions("evaluation.preferred", module.evaluation.preferred, val)


def check_minibatches(minibatches: int, batch_size: int) -> None:
    """Raise a ValueError if a rollout has fewer prompts than slices."""
    if minibatches > batch_size:
        raise ValueError(
            f"minibatches={minibatches} is more than the {batch_size} prompts of a rollout: lower it, raise "
            "data.batch_size, or cut groups with sample_minibatches"
        )


def data_module(module: Algorithm) -> Any:
    """The data module that a run was given, None without one or outside a run."""
    return getattr(module._trainer, "datamodule", None)


def check_record(module: Algorithm) -> None:
    """Raise a ValueError if the data module hands over something else than what the method learns from."""
    data, wanted = data_module(module), module.record
    given = getattr(data, "batch_type", None)
    if wanted is None or given is None or given is wanted:
        return
    if given in DATA or not issubclass(given, wanted):
        raise ValueError(
            f"{type(module).__name__} learns from {wanted.__name__} and {type(data).__name__} yields "
            f"{given.__name__}: give --data {DATA[wanted]}"
        )


def check_positions(module: Algorithm, config: Any, whose: str) -> None:
    """Raise a ValueError if prompt and completion together can be longer than a model's positions."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest, length = getattr(data_module(module), "max_sequence_length", 0), module.max_new_tokens
    if known is None or longest + length <= known:
        return
    if length == 0:
        raise ValueError(
            f"a row of {longest} tokens exceeds the {known} positions of the {whose}: leave out longer ones with "
            "data.max_prompt_tokens and data.max_completion_tokens"
        )
    raise ValueError(
        f"a prompt of {longest} tokens and max_new_tokens={length} exceed the {known} positions of the {whose}: "
        f"lower one of them, the prompts by data.max_prompt_tokens={max(1, known - length)}"
    )


def check_loader(module: OnlineAlgorithm) -> None:
    """Raise a ValueError if a rollout lasts several steps, and the training loader does not repeat its prompts.

    Nor does one that a `PromptData` has made outside the run; it would not find its place on a resume either.
    """
    loader = module.trainer.train_dataloader
    if isinstance(loader, ResumableLoader) and loader.trainer is not module.trainer:
        raise ValueError(
            "the training loader was made outside the run, and knows nothing of its ranks and its place: give the data "
            "module itself, trainer.fit(method, datamodule=data)"
        )
    if module.repeats > 1 and not isinstance(loader, ResumableLoader):
        raise ValueError(
            f"a rollout lasts {module.repeats} steps here, for which the loader must repeat its prompts: give the "
            "data as a lit_rlhf.PromptData instead of a loader of your own, or set minibatches and epochs to 1"
        )


def check_plan(module: OnlineAlgorithm, batch_size: int | None) -> None:
    """Check that slices, accumulation and sampling fit together, and say how many updates a rollout gets.

    Raises:
        ValueError: If they don't.
    """
    repeats, accumulate = module.repeats, module.trainer.accumulate_grad_batches
    slices = module.minibatches * module.sample_minibatches
    if any(isinstance(c, GradientAccumulationScheduler) for c in getattr(module.trainer, "callbacks", ())):
        raise ValueError(
            "GradientAccumulationScheduler changes what an update is while a rollout is cut into slices by it: set "
            "accumulate_grad_batches, and let the batch grow by lit_rlhf.callbacks.BatchSchedule"
        )
    if slices % accumulate and (accumulate % slices or module.epochs > 1):
        raise ValueError(
            f"accumulate_grad_batches={accumulate} does not fit a rollout of {slices} slices (minibatches x "
            f"sample_minibatches): give a divisor of {slices}, or with epochs=1 a multiple of it"
        )
    if batch_size is not None:
        check_minibatches(module.minibatches, batch_size)
    if module.sampling.greedy:
        raise ValueError("sampling.greedy is for `predict`: training on greedy completions explores nothing")
    updates = max(1, repeats // accumulate)
    rank_zero_info(f"each rollout is used for {updates} update{'s' * (updates > 1)}")
    if updates > 2 and not module.corrects_off_policy:
        rank_zero_warn(
            f"{updates} updates a rollout: all but the first are off-policy and this is not corrected; raise "
            f"accumulate_grad_batches to {slices}{' and set epochs to 1' * (module.epochs > 1)} to be exactly on-policy"
        )
    if module.sampling.truncates:
        rank_zero_warn(
            "top_p, top_k and min_new_tokens bias the gradient, the more the further train/sampled_mass is below 1: "
            "training is best without them"
        )
