import pytest
import torch

from lit_rlhf.models.loading import resolve
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.testbed import (
    POLICY,
    REWARD_MODEL,
    Raters,
    ReviewPrompts,
    ReviewReward,
    briefs,
    gold,
    make_tokenizer,
    prompts,
)
from lit_rlhf.testbed.build import accuracy, build, sampled_pairs


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


def test_the_name_of_the_testbed_is_the_shipped_policy():
    assert resolve("testbed") == str(POLICY) and POLICY.is_dir()
    assert resolve("gpt2") == "gpt2"


def test_the_models_are_small_and_loaded_in_float32(policy):
    size = sum(path.stat().st_size for folder in (POLICY, REWARD_MODEL) for path in folder.iterdir())
    assert size < 5e6
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    reward = ReviewReward()
    reward.setup("cpu")
    assert {p.dtype for p in reward._scorer.parameters()} == {torch.float32}


def test_the_models_know_the_words_of_this_code(policy):
    assert policy.tokenizer.get_vocab() == make_tokenizer().get_vocab()


def test_the_policy_leaves_room_and_its_samples_vary(policy, reviews):
    best = sum(1.2 * brief.sentences for brief in briefs(96, held_out=True)) / 96
    for options in ({"greedy": True}, {}):
        worth = gold(prompts=reviews.text, completions=completions(policy, reviews, **options))
        assert sum(worth) / 96 < best / 2
    assert torch.tensor(worth).std() > 0.5
    assert len(set(completions(policy, reviews))) > 85


def test_the_reward_model_is_mostly_right_and_sometimes_wrong(policy):
    rows = prompts(96, held_out=True)
    asked = Raters().preferences(sampled_pairs([policy], rows, rounds=1, seed=1), seed=1)
    noisy, true = accuracy(ReviewReward(), asked)
    assert 0.58 < noisy < 0.80
    assert 0.65 < true < 0.92


def test_prompts_come_in_the_sizes_asked_for():
    data = ReviewPrompts(train_size=40, val_size=8, batch_size=16)
    data.tokenizer = make_tokenizer()
    data.setup()
    assert len(data.train_set) == 40 and len(data.val_set) == 8
    assert set(next(iter(data.val_dataloader())).text) == {row["prompt"] for row in prompts(8, held_out=True)}


@pytest.mark.filterwarnings("ignore")
def test_the_command_that_builds_the_models_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # and back to what it was
    build(tmp_path, seed=1, num_demonstrations=64, num_prompts=16, rounds=2, updates=2)
    assert "with the raters in" in capsys.readouterr().out
    trained = Policy.from_pretrained(tmp_path / "policy")
    assert trained.causal_lm.config.hidden_size == 128
    scores = ReviewReward(model=tmp_path / "reward_model")([prompts(1)[0]["prompt"]], ["It was good."])
    assert scores.isfinite().all()
