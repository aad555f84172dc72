"""Online DPO: the loss of its pairs by enumeration, which pairs it takes, and a judge that ranks."""

import pytest
import torch

import lit_rlhf
from enumerable import plain_logprobs
from enumeration import ALL, PROMPT, SEQUENCE_REWARDS, assert_same, flat_gradient, make_module, step_gradient
from lit_rlhf.errors import InputError
from runs import make_data, make_trainer, vowels
from runs import make_module as make_tiny


def longer(prompts, completions, opponents):
    return [float(len(a) > len(b)) if len(a) != len(b) else 0.5 for a, b in zip(completions, opponents, strict=True)]


longer.pairwise = True
GROUP = [ALL[4], ALL[1], ALL[5], ALL[0]]


def pair_gradient(module, best, worst) -> torch.Tensor:
    """Return the gradient of DPO's loss of a pair."""
    ratios = [
        plain_logprobs(module.policy.causal_lm, PROMPT, y).sum()
        - plain_logprobs(module.initial, PROMPT, y).sum().detach()
        for y in (best, worst)
    ]
    module.zero_grad()
    (-torch.nn.functional.logsigmoid(module.beta * (ratios[0] - ratios[1]))).backward()
    return flat_gradient(module)


def test_it_is_dpo_on_the_best_and_the_worst_completion():
    module = make_module(lit_rlhf.OnlineDPO, num_samples=4, kl_coef=0.0, beta=0.7)
    best, worst = max(GROUP, key=SEQUENCE_REWARDS.get), min(GROUP, key=SEQUENCE_REWARDS.get)
    assert_same(step_gradient(module, GROUP), pair_gradient(module, best, worst))


def test_a_judge_ranks_in_place_of_the_rewards():
    module = make_module(lit_rlhf.OnlineDPO, num_samples=3, kl_coef=0.0, ranking_judge=longer)
    assert_same(step_gradient(module, [ALL[1], ALL[3], ALL[0]]), pair_gradient(module, ALL[3], ALL[0]))
    assert module.rollout.ranking.tolist() == [[0.5, 1.0, 0.0]]


def test_a_judge_that_decides_nothing_leaves_the_prompt_out():
    def silent(prompts, completions, opponents):
        return [None] * len(prompts)

    silent.pairwise = True
    module = make_module(lit_rlhf.OnlineDPO, num_samples=3, ranking_judge=silent, kl_coef=0.0)
    with pytest.warns(UserWarning, match="no completion of this update counts"):
        assert not step_gradient(module, GROUP[:3]).any()


class Borda(lit_rlhf.RankingAlgorithm):
    """Advantages are ranks; what is not valid is not masked."""

    def advantages(self, rollout):
        ranks = rollout.ranking.argsort(1).argsort(1).float()
        return ranks - ranks.mean(1, keepdim=True)

    def loss(self, part):
        return -part.advantages.unsqueeze(-1) * part.logprobs, {}


def shy(prompts, completions, opponents):
    """Judge only pairs of two completions that aren't empty."""
    return [float(a > b) if a and b else None for a, b in zip(completions, opponents, strict=True)]


shy.pairwise = True


def some(completion_ids, **kwargs):
    return [-float(len(ids)) if len(ids) == 2 else None for ids in completion_ids]


@pytest.mark.parametrize("ranks", ["rewards", "a judge"])
def test_a_completion_without_a_rank_has_no_part_in_the_update(ranks):
    options = dict(ranking_judge=shy) if ranks == "a judge" else dict(rewards=(some,))
    module = make_module(Borda, num_samples=4, kl_coef=0.0, **options)
    step_gradient(module, [ALL[0], ALL[3], ALL[0], ALL[4]])
    rollout = module.rollout
    assert rollout.ranking[~rollout.valid].tolist() == [-float("inf")] * (4 - int(rollout.valid.sum()))
    assert rollout.valid.any() and not rollout.valid.all()
    assert not rollout.advantages[~rollout.valid].any() and rollout.advantages[rollout.valid].all()


@pytest.mark.parametrize("place", ["k1_reward", "k2_loss"])
def test_beside_a_judge_a_kl_must_be_in_the_loss(place):
    options = dict(num_samples=3, ranking_judge=longer, kl_coef=0.1, kl_penalty=place)
    if place == "k1_reward":
        with pytest.raises(InputError, match=r"kl_coef=0\.1 in the reward has no effect"):
            make_module(lit_rlhf.OnlineDPO, **options)
        return
    group = [ALL[1], ALL[3], ALL[0]]
    gradients = [step_gradient(make_module(lit_rlhf.OnlineDPO, **{**options, "kl_coef": c}), group) for c in (0.1, 0.3)]
    assert (gradients[0] - gradients[1]).norm() > 1e-3


@pytest.mark.parametrize("answer", [0.3, 0.55, 0.07])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_judge_that_prefers_a_place_leaves_the_prompt_out(answer, k):
    def biased(prompts, completions, opponents):
        return [answer] * len(prompts)

    biased.pairwise = True
    module = make_module(lit_rlhf.OnlineDPO, num_samples=k, kl_coef=0.0, ranking_judge=biased)
    with pytest.warns(UserWarning, match="no completion of this update counts"):
        assert not step_gradient(module, GROUP[:k]).any()


def test_completions_that_are_all_alike_are_left_out():
    def same(completions, **kwargs):
        return [1.0] * len(completions)

    module = make_module(lit_rlhf.OnlineDPO, (same,), num_samples=4, kl_coef=0.0)
    with pytest.warns(UserWarning, match="no completion of this update counts"):
        assert not step_gradient(module, GROUP).any()


def checksum(completion_ids, **kwargs):
    return [float(sum(ids) % 7) for ids in completion_ids]


def test_it_learns_and_logs(tiny, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(make_tiny("OnlineDPO", tiny, kl_coef=0.0, rewards=[checksum]), make_data("OnlineDPO"))
    assert 0 <= trainer.callback_metrics["train/accuracy"] <= 1
    assert {"train/reward_margin", "train/loss", "val/reward"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta=0.0 must be a finite number above 0"),
        ({"num_samples": 1}, "num_samples=1 must be at least 2"),
        ({"reference": None, "kl_coef": 0.0}, "reference can't be null"),
        ({"sample_minibatches": 3}, "sample_minibatches=3 can't split"),
        ({"ranking_judge": longer, "kl_coef": 0.1}, "the ranking_judge ranks, not the return: kl_coef"),
        (
            {"ranking_judge": longer, "kl_coef": 0.0, "clip": 1.0},
            "not the return: shaping of rewards has no effect",
        ),
        (
            {"ranking_judge": longer, "kl_coef": 0.0, "reward": "vowels", "rewards": [vowels]},
            "dynamic_sampling would leave prompts out by a reward",
        ),
        ({"ranking_judge": vowels, "kl_coef": 0.0}, "has to compare two completions, with the attribute `pairwise"),
        ({"correction": "mask"}, "OnlineDPO learns from completions, whoever sampled them"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_options_are_one_sentence(options, message, tiny):
    with pytest.raises(InputError, match=message):
        make_tiny("OnlineDPO", tiny, **options)


def test_a_judge_that_reads_a_missing_column_is_refused_before_sampling(tiny, tmp_path):
    def judge(prompts, completions, opponents, rubric):
        return [0.5] * len(prompts)

    judge.pairwise = True
    module = make_tiny("OnlineDPO", tiny, kl_coef=0.0, ranking_judge=judge)
    with pytest.raises(InputError, match="rubric"):
        make_trainer(tmp_path, max_steps=1).fit(module, make_data("OnlineDPO"))
