import math

import pytest
import torch

import lit_rlhf
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.pretrained import resolve
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.testbed import (
    POLICY,
    REWARD_MODEL,
    GoodReview,
    Raters,
    ReviewPrompts,
    ReviewReward,
    UnequalScale,
    briefs,
    gold,
    make_tokenizer,
    prompts,
)
from lit_rlhf.testbed.build import accuracy, build, sampled_pairs
from runs import make_trainer


@pytest.fixture(scope="module")
def policy():
    return Policy.from_pretrained("testbed")


@pytest.fixture(scope="module")
def reviews(policy):
    data = ReviewPrompts(val_size=96, eval_batch_size=96)
    data.tokenizer = policy.tokenizer
    data.setup()
    return next(iter(data.val_dataloader()))


def completions(policy, reviews, **sampling):
    return policy.tokenizer.batch_decode(
        policy.sample(reviews, 1, Sampling(max_new_tokens=32, **sampling)).ids(), skip_special_tokens=True
    )


def test_policy_name_testbed_resolves_to_the_shipped_policy():
    assert resolve("testbed") == str(POLICY) and POLICY.is_dir()
    assert resolve("gpt2") == "gpt2"


def test_shipped_models_are_small_and_load_in_float32(policy):
    size = sum(path.stat().st_size for folder in (POLICY, REWARD_MODEL) for path in folder.iterdir())
    assert size < 5e6
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    reward = ReviewReward()
    reward.setup("cpu")
    assert {p.dtype for p in reward._scorer.parameters()} == {torch.float32}


@pytest.mark.parametrize("reward", [GoodReview, UnequalScale])
def test_rewards_of_experiments_train(reward, tmp_path):
    module = lit_rlhf.RLOO("testbed", rewards=[reward()], sampling=Sampling(max_new_tokens=4))
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, ReviewPrompts(train_size=8, batch_size=4, val_size=4))
    assert math.isfinite(trainer.callback_metrics["train/reward"])


def test_shipped_tokenizer_matches_the_code(policy):
    assert policy.tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_shipped_policy_is_improvable_and_its_samples_vary(policy, reviews):
    best = sum(1.2 * brief.sentences for brief in briefs(96, held_out=True)) / 96
    for options in ({"greedy": True}, {}):
        utilities = gold(prompts=reviews.text, completions=completions(policy, reviews, **options))
        assert sum(utilities) / 96 < best / 2
    assert torch.tensor(utilities).std() > 0.5
    assert len(set(completions(policy, reviews))) > 85


def test_shipped_reward_model_is_better_than_chance_but_imperfect(policy):
    rows = prompts(96, held_out=True)
    pairs = Raters().preferences(sampled_pairs([policy], rows, rounds=1, seed=1), seed=1)
    by_raters, by_gold = accuracy(ReviewReward(), pairs)
    assert 0.58 < by_raters < 0.80
    assert 0.65 < by_gold < 0.92


def test_review_prompts_have_the_requested_sizes():
    data = ReviewPrompts(train_size=40, val_size=8, batch_size=16)
    data.tokenizer = make_tokenizer()
    data.setup()
    assert len(data.train_set) == 40 and len(data.val_set) == 8
    assert set(next(iter(data.val_dataloader())).text) == {row["prompt"] for row in prompts(8, held_out=True)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_build_writes_loadable_models(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # restored after the test
    build(tmp_path, seed=1, num_demonstrations=64, num_prompts=16, rounds=2, updates=2)
    assert "with the raters in" in capsys.readouterr().out
    trained = Policy.from_pretrained(tmp_path / "policy")
    assert trained.causal_lm.config.hidden_size == 128
    scores = ReviewReward(model=tmp_path / "reward_model")([prompts(1)[0]["prompt"]], ["It was good."])
    assert scores.isfinite().all()
