"""The known ways to get these methods subtly wrong, each as a property of runs with a real Trainer."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

import lit_rlhf
from enumerable import make_prompts
from lit_rlhf import functional as F
from lit_rlhf.models.policy import Policy
from runs import grouped, make_data, make_trainer
from runs import make_module as make_any_module
from tiny import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:a prompt without a reward")

RATE = 0.5


def worth(completion_ids, **kwargs):
    return [sum(ids) % 7 / 4 for ids in completion_ids]


def some_opinion(completion_ids, **kwargs):
    """A reward that says nothing of a third of the completions."""
    scores = zip(completion_ids, worth(completion_ids), strict=True)
    return [None if sum(ids) % 3 == 0 else score for ids, score in scores]


def of_tokens(completion_ids, **kwargs):
    return [[token % 5 / 4 for token in ids] for ids in completion_ids]


of_tokens.token_level = True


def make_module(name, folder, **options):
    if name in ("RLOO", "Reinforce"):
        options = {"rewards": [worth], **options}
    return make_any_module(name, folder, **options)


class Recorder(Callback):
    """Keeps every rollout, and what was logged with it."""

    def __init__(self) -> None:
        self.rollouts, self.metrics = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if getattr(module, "rollout", None) is not None and batch_idx % module.steps_per_rollout == 0:
            self.rollouts.append(module.rollout)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def sgd(params):
    return torch.optim.SGD(params, lr=RATE)


def train(name, folder, root, updates=1, trainer=None, data=None, module=None, loader=None, **options):
    """Weights after some updates of plain SGD, in which a wrong factor of the gradient shows; and what was recorded."""
    recorder = Recorder()
    torch.manual_seed(0)  # the reward model's head
    options.setdefault("optimizer", sgd)
    module = module or make_module(name, folder, **options)
    runner = make_trainer(root, max_steps=updates, callbacks=[recorder], limit_val_batches=0, **(trainer or {}))
    runner.fit(module, loader) if loader else runner.fit(module, make_data(name, **(data or {})))
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    return weights, recorder


def assert_same_update(actual, expected, start) -> None:
    moved = max(float((expected[n] - start[n]).abs().max()) for n in expected)
    assert moved > 1e-2
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, atol=1e-4 * moved, rtol=0, msg=name)


def start_of(name, folder):
    torch.manual_seed(0)
    module = make_module(name, folder)
    module.configure_model()
    return {n: p.detach() for n, p in module.named_parameters()}


# 12. How a rollout is cut, and how many steps make an update, changes nothing

CUTS = [
    {"num_minibatches": 2},
    {"num_minibatches": 4},
    {"sample_minibatches": 3},
    {"num_minibatches": 3, "sample_minibatches": 2},
]
REWARDS = {
    "all count": {},
    "some have no opinion": {"rewards": [some_opinion]},
    "truncated left out": {"mask_truncated_completions": True},
    "token by token": {"rewards": [worth, of_tokens]},
}


@pytest.fixture(scope="module")
def in_one_piece():
    """What `train` returned for rollouts in one piece, by case."""
    return {}


@pytest.mark.parametrize("case", REWARDS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_update_does_not_depend_on_how_a_rollout_is_cut(cut, case, in_one_piece, ending, tmp_path):
    accumulate = cut.get("num_minibatches", 1) * cut.get("sample_minibatches", 1)
    if case not in in_one_piece:
        in_one_piece[case] = train("RLOO", ending, tmp_path, updates=2, **REWARDS[case])
    weights, recorder = in_one_piece[case]
    cuts = {"accumulate_grad_batches": accumulate}
    sliced, _ = train("RLOO", ending, tmp_path, updates=2, trainer=cuts, **cut, **REWARDS[case])
    if case in ("some have no opinion", "truncated left out"):
        counts = recorder.rollouts[0].valid.sum(1)
        assert 0 < counts.sum() < 12 and counts.unique().numel() > 1
    assert_same_update(sliced, weights, start_of("RLOO", ending))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RLOO", {"rewards": [some_opinion]}),
        ("Reinforce", {"baseline": "none", "mask_truncated_completions": True}),
        ("SFT", {}),
        ("RewardModeling", {}),
    ],
)
def test_one_batch_of_eight_is_eight_of_one(name, options, ending, tmp_path):
    at_once, _ = train(name, ending, tmp_path, data={"batch_size": 8}, **options)
    one_by_one, _ = train(
        name, ending, tmp_path, data={"batch_size": 1}, trainer={"accumulate_grad_batches": 8}, **options
    )
    assert_same_update(one_by_one, at_once, start_of(name, ending))


def test_clipping_is_of_the_whole_gradient(ending, tmp_path):
    """The norm that clips is the one of the counted mean, however the rollout is cut."""
    options = {"rewards": [some_opinion]}
    clip = {"gradient_clip_val": 0.05}
    whole, _ = train("RLOO", ending, tmp_path, trainer=clip, **options)
    cuts = {**clip, "accumulate_grad_batches": 4}
    sliced, _ = train("RLOO", ending, tmp_path, trainer=cuts, num_minibatches=4, **options)
    start = start_of("RLOO", ending)
    moved = torch.cat([(whole[n] - start[n]).flatten() for n in whole]).norm()
    torch.testing.assert_close(moved.item(), RATE * 0.05, atol=1e-5, rtol=0)
    for name, weight in whole.items():
        torch.testing.assert_close(sliced[name], weight, atol=1e-6, rtol=0)


def test_what_a_step_is_divided_by_is_not_what_it_holds(ending, tmp_path):
    """Ranks may hold batches of different size, and average gradients before the division is corrected."""
    losses = []
    for rows in (2, 4):
        module = make_module("SFT", ending)
        module.trainer = make_trainer(tmp_path)
        losses.append(float(module.reduce_loss(torch.ones(rows), torch.ones(rows, dtype=torch.bool))))
    assert losses[0] / 2 == losses[1] / 4


# 8. and 9. Groups that say nothing


def test_equal_rewards_teach_nothing_and_are_logged(ending, tmp_path):
    def same(completions, **kwargs):
        return [0.7] * len(completions)

    weights, recorder = train("RLOO", ending, tmp_path, rewards=[same], kl_coef=0.0)
    assert (recorder.rollouts[0].advantages == 0).all()
    assert recorder.metrics[0]["train/zero_variance_groups"] == 1
    assert recorder.metrics[0]["train/advantage_std"] == 0
    assert all(torch.equal(weights[n], p) for n, p in start_of("RLOO", ending).items())


def make_batch(*words: str):
    tokenizer = make_tokenizer()
    prompts = make_prompts(*[tokenizer(word)["input_ids"] for word in words])
    return prompts.replace(text=list(words))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
def test_a_group_without_an_opinion_is_left_out_and_counted(ending, tmp_path):
    """The update is that of the other prompts alone."""

    def silent_on_plays(prompts, completion_ids, **kwargs):
        pairs = zip(prompts, worth(completion_ids), strict=True)
        return [None if prompt == "a play" else score for prompt, score in pairs]

    words = ["film", "a book", "song"]

    def train_on(batch):
        loader = DataLoader([batch], batch_size=None)
        return train("RLOO", ending, tmp_path, loader=loader, rewards=[silent_on_plays])

    expected, _ = train_on(make_batch(*words))
    with pytest.warns(UserWarning, match="a prompt without a reward for any completion is skipped"):
        weights, recorder = train_on(make_batch(*words, "a play"))
    assert recorder.metrics[0]["train/skipped_groups"] == 0.25
    assert_same_update(weights, expected, start_of("RLOO", ending))


@pytest.mark.parametrize("cut", [{}, {"num_minibatches": 2, "sample_minibatches": 2}], ids=str)
def test_an_update_in_which_nothing_counts_leaves_the_weights_and_warns(cut, ending, tmp_path):
    """Bitwise, under momentum and weight decay too: the update before has filled AdamW's moments."""
    calls = []

    def silent_second_time(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        return [None if len(calls) == 2 else score for score in worth(completion_ids)]

    class Snapshots(Callback):
        weights: list = []  # noqa: RUF012

        def on_before_zero_grad(self, trainer, module, optimizer):
            self.weights = [*self.weights, [p.detach().clone() for p in module.parameters()]]

    snapshots = Snapshots()
    module = make_module(
        "RLOO",
        ending,
        rewards=[silent_second_time],
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
        **cut,
    )
    data = make_data("RLOO", val=None)
    accumulate = cut.get("num_minibatches", 1) * cut.get("sample_minibatches", 1)
    runner = make_trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate, callbacks=[snapshots])
    with pytest.warns(UserWarning, match="no completion of this update counts"):
        runner.fit(module, data)
    before = snapshots.weights  # of each update, then what is left at the end
    after_first, after_second = before[1], before[2]
    assert all(torch.equal(a, b) for a, b in zip(after_first, after_second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[0], after_first, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(after_second, module.parameters(), strict=True))


# 1. and 2. What is optimised


class Plainest(lit_rlhf.RLOO):
    """Overrides one equation, with `returns`, as a user would."""

    def advantages(self, rollout):
        return rollout.returns


def moved_module(method, folder, **options):
    """A method whose policy is no longer its reference."""
    options = {"rewards": [worth], "optimizer": sgd, **options}
    module = method(str(folder), **grouped({"num_samples": 3, "max_new_tokens": 6, **options}))
    module.configure_model()
    torch.manual_seed(2)
    for parameter in module.policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_kl_is_in_the_returns_that_a_subclass_uses(temperature, ending, tmp_path):
    """Summed over the tokens of the completion, the EOS token included, at the temperature of the samples."""
    beta = 0.5
    module = moved_module(Plainest, ending, kl_coef=beta, temperature=temperature)
    base = Policy.from_pretrained(ending)
    _, recorder = train("RLOO", ending, tmp_path, module=module)
    (rollout,) = recorder.rollouts
    assert rollout.completions.finished.any() and not rollout.completions.finished.all()
    reference = base.logprobs(rollout.prompts, rollout.completions, temperature).detach()
    expected = rollout.rewards.clone()
    for i, j, t in rollout.completions.mask.nonzero().tolist():
        expected[i, j] -= beta * (rollout.completions.logprobs[i, j, t] - reference[i, j, t])
    assert (expected - rollout.rewards).abs().max() > 0.05
    torch.testing.assert_close(rollout.returns, expected, atol=1e-4, rtol=0)
    assert torch.equal(rollout.advantages, rollout.returns)
    kl = (rollout.rewards - rollout.returns).mean() / beta
    torch.testing.assert_close(recorder.metrics[0]["train/kl"], kl.item(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("baseline", ["mean", "exponential"])
def test_the_moving_average_is_of_earlier_rollouts_only(baseline, ending, tmp_path):
    _, recorder = train(
        "Reinforce", ending, tmp_path, updates=3, baseline=baseline, baseline_decay=0.75, rewards=[some_opinion]
    )
    first, second, third = recorder.rollouts
    means = [rollout.returns[rollout.valid].double().mean() for rollout in recorder.rollouts]
    counts = [rollout.valid.sum() for rollout in recorder.rollouts]
    assert counts[0] != counts[1]
    weights = counts[:2] if baseline == "mean" else [0.75 * 0.25, 0.25]
    before_third = (weights[0] * means[0] + weights[1] * means[1]) / sum(weights)
    for rollout, before in [(first, 0.0), (second, means[0]), (third, before_third)]:
        expected = (rollout.returns - before)[rollout.valid].float()
        torch.testing.assert_close(rollout.advantages[rollout.valid].float(), expected, atol=1e-6, rtol=0)


def test_with_token_rewards_the_moving_average_is_of_the_total(ending, tmp_path):
    _, recorder = train("Reinforce", ending, tmp_path, updates=2, rewards=[worth, of_tokens])
    first, second = recorder.rollouts
    total = first.returns + F.masked_sum(first.token_rewards, first.completions.mask)
    to_go = F.reward_to_go(second.token_rewards, second.completions.mask)
    expected = second.returns.unsqueeze(-1) + to_go - total.double().mean()
    counts = second.completions.mask
    torch.testing.assert_close(second.advantages[counts].float(), expected[counts].float(), atol=1e-5, rtol=0)


# 4., 6. and 10. What counts, and at which temperature


def test_what_stands_behind_the_end_of_a_completion_counts_nowhere(ending, tmp_path):
    module = make_module("RLOO", ending, optimizer=sgd, rewards=[worth, of_tokens])
    _, recorder = train("RLOO", ending, tmp_path, module=module)
    (rollout,) = recorder.rollouts
    padding = ~rollout.completions.mask
    assert padding.any()
    poisoned = rollout.replace(
        completions=rollout.completions.replace(
            tokens=rollout.completions.tokens.masked_fill(padding, 77),
            logprobs=rollout.completions.logprobs.masked_fill(padding, torch.nan),
        ),
        reference_logprobs=rollout.reference_logprobs.masked_fill(padding, torch.nan),
        token_rewards=rollout.token_rewards.masked_fill(padding, torch.nan),
    )
    poisoned = poisoned.replace(advantages=module.advantages(poisoned))
    assert torch.equal(module.advantages(rollout), poisoned.advantages)
    assert torch.equal(*(module.loss(module.evaluate(part))[0] for part in (rollout, poisoned)))


def test_rewards_are_given_the_token_that_ends_a_completion_and_nothing_behind_it(ending, tmp_path):
    seen = []

    def look(completion_ids, finished, **kwargs):
        seen.extend(zip(completion_ids, finished, strict=True))
        return [0.0] * len(finished)

    train("RLOO", ending, tmp_path, rewards=[look])
    eos = set(range(2, 262, 4))
    assert {finished for _, finished in seen} == {True, False}
    for ids, finished in seen:
        assert not eos & set(ids[:-1])
        assert (ids[-1] in eos) == finished
        assert finished or len(ids) == 6


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_at_the_first_rollout_the_kl_is_zero_to_rounding_and_the_mismatch_is_logged(temperature, ending, tmp_path):
    _, recorder = train("RLOO", ending, tmp_path, temperature=temperature)
    metrics = recorder.metrics[0]
    assert abs(metrics["train/kl"]) < 1e-4
    assert 0 <= metrics["train/logprob_mismatch"] < 1e-5


def test_truncated_sampling_warns_and_logs_the_kept_mass(ending, tmp_path):
    with pytest.warns(UserWarning, match="bias the gradient"):
        _, recorder = train("RLOO", ending, tmp_path, top_k=20)
    assert 0.01 < recorder.metrics[0]["train/sampled_mass"] < 0.99


# 5. The end of a completion, for a reward model


def test_a_reward_model_reads_in_use_what_it_read_in_training(ending, tmp_path):
    """The EOS token behind a completion that ended by itself included, which it can tell from one that was cut."""
    module = make_module("RewardModeling", ending, optimizer=sgd)
    train("RewardModeling", ending, tmp_path, module=module)
    module.save_model(tmp_path / "model")
    data = make_data("RewardModeling")
    data.tokenizer = module.tokenizer
    data.setup()
    batch = next(iter(data.train_dataloader()))
    trained = module.scores(batch).detach()
    reward = lit_rlhf.rewards.RewardModel(tmp_path / "model")
    for column, text in enumerate(("good {}", "bad -{}")):
        completions = [text.format(i).replace("-0", "0") for i in batch.prompts.index.tolist()]
        torch.testing.assert_close(reward(batch.prompts.text, completions), trained[:, column], atol=1e-4, rtol=1e-4)
        cut = reward(batch.prompts.text, completions, finished=[False] * len(completions))
        assert ((cut - trained[:, column]).abs() > 1e-3).any()


# 3. Log-softmax in at least float32


def test_log_probabilities_of_a_bfloat16_policy_are_float32(ending):
    policy = Policy.from_pretrained(ending, dtype="bfloat16")
    prompts = make_batch("film", "a book")
    drawn = policy.sample(prompts, 2, lit_rlhf.models.sampling.Sampling(max_new_tokens=4))
    scored = policy.logprobs(prompts, drawn)
    assert drawn.logprobs.dtype == scored.dtype == torch.float32
    assert not torch.equal(scored, scored.bfloat16().float())


def test_the_moving_average_is_float64_for_weights_in_bfloat16(ending):
    module = make_any_module("Reinforce", ending, optimizer=sgd).to(torch.bfloat16)
    module.sum_over_ranks = lambda values: values
    for _ in range(300):
        module.update_baseline(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bool))
    assert module.baseline_average.weight == 300  # a count in bfloat16 stops growing at 256
