"""Signs of a run that learns nothing, each as one warning."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback

import lit_rlhf
from lit_rlhf.data import FirstWords
from lit_rlhf.models.reference import Reference
from lit_rlhf.training.diagnosis import MovementCheck, RolloutDiagnosis
from runs import make_data, make_module, make_trainer, vowels
from tiny import make_tokenizer

SIGNS = (
    "completions ended within",
    "nothing to learn from",
    "KL to the reference is 0",
    "nothing is learned",
    "plain text",
)


def letters(completions, **kwargs):
    """Return the number of different letters, of text and messages alike."""
    return [float(len(set(str(completion)))) for completion in completions]


def signs(name, folder, root, lr=1e-2, data=None, steps=6, **options):
    """Return the signs in the warnings of a run, with repetitions."""
    options = options if name in ("SFT", "DPO") else {"rewards": [letters], **options}
    trainer = make_trainer(root, max_steps=steps, limit_val_batches=0, callbacks=options.pop("callbacks", None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make_module(name, folder, lr=lr, **options), data or make_data(name))
    messages = [str(warning.message) for warning in caught]
    return sorted(sign for sign in SIGNS for message in messages if sign in message)


def chat(rows=24):
    return lit_rlhf.PromptData(
        train=[{"prompt": [{"role": "user", "content": f"film {i}"}]} for i in range(rows)], batch_size=4
    )


@pytest.mark.parametrize("name", ["RLOO", "RAFT", "GRPO", "PPO", "VanillaPG"])
def test_a_run_that_learns_has_no_signs(name, ending, tmp_path):
    options = {"num_samples": 1} if name == "VanillaPG" else {}
    assert signs(name, ending, tmp_path, data=chat(), max_new_tokens=12, **options) == []


@pytest.mark.parametrize("name", ["SFT", "DPO"])
@pytest.mark.filterwarnings("ignore")
def test_a_run_on_pairs_that_learns_has_no_signs(name, tiny, tmp_path):
    assert signs(name, tiny, tmp_path) == ["plain text"]


def test_completions_that_never_end(tiny, tmp_path):
    assert signs("RLOO", tiny, tmp_path, data=chat(), max_new_tokens=2) == ["completions ended within"]
    assert signs("RLOO", tiny, tmp_path, data=chat(), max_new_tokens=2, steps=2) == []  # too early to say
    with pytest.warns(UserWarning, match=r"\d of the first 36 completions ended within sampling.max_new_tokens=2, the"):
        make_trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(
            make_module("RLOO", tiny, max_new_tokens=2, rewards=[letters]), chat()
        )


def constant(completions, **kwargs):
    return [1.0] * len(completions)


def of_the_prompt(completions, prompts, **kwargs):
    return [float(sum(map(ord, str(prompt)))) for prompt in prompts]


@pytest.mark.parametrize("reward", [constant, of_the_prompt])
@pytest.mark.parametrize("kl_coef", [0.0, 0.05])
def test_rewards_that_do_not_differ(reward, kl_coef, ending, tmp_path):
    options = dict(data=chat(), max_new_tokens=12, kl_coef=kl_coef)
    assert signs("RLOO", ending, tmp_path, rewards=[reward], **options) == ["nothing to learn from"]


def test_single_samples_differ_from_prompt_to_prompt(ending, tmp_path):
    options = dict(data=chat(), max_new_tokens=12, num_samples=1)
    assert signs("Reinforce", ending, tmp_path, rewards=[constant], **options) == ["nothing to learn from"]
    assert signs("Reinforce", ending, tmp_path, rewards=[of_the_prompt], **options) == []


@pytest.mark.parametrize(("name", "options"), [("Reinforce", {"num_samples": 1}), ("PPO", {"num_samples": 2})])
def test_a_baseline_of_other_prompts_learns_from_groups_without_differences(name, options, ending, tmp_path):
    data = lit_rlhf.PromptData(train=chat().train, batch_size=1)
    options = dict(data=data, max_new_tokens=12, rewards=[of_the_prompt], **options)
    assert signs(name, ending, tmp_path, **options) == []


@pytest.mark.parametrize("lr", [0.0, 1e-12])
def test_a_learning_rate_that_moves_nothing(lr, ending, tmp_path):
    assert signs("RLOO", ending, tmp_path, lr=lr, data=chat(), max_new_tokens=12) == ["nothing is learned"]
    assert signs("SFT", ending, tmp_path, lr=lr) == ["nothing is learned", "plain text"]


def test_a_learning_rate_that_hardly_moves_a_new_adapter(ending, tmp_path):
    module = make_module("RLOO", ending, max_new_tokens=12, rewards=[letters], lr=1e-9, lora={"r": 2})
    with pytest.warns(
        UserWarning, match="KL to the reference is 0 after 5 updates: either a learning rate of 1e-09 is"
    ):
        make_trainer(tmp_path, max_steps=7, limit_val_batches=0).fit(module, chat())


class OwnReference(Callback):
    """Let the reference follow the policy."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.reference = Reference.of(module.policy)


def test_a_reference_that_follows_the_policy(ending, tmp_path):
    found = signs("RLOO", ending, tmp_path, data=chat(), max_new_tokens=12, callbacks=[OwnReference()])
    assert found == ["KL to the reference is 0"]


def facts(**changes):
    values = dict(
        completions=8, finished=8, groups=2, varied_groups=1, highest=1.0, lowest=0.0, tokens=80, difference=1.0
    )
    return {**values, **changes}


def test_ranks_are_counted_together():
    diagnosis = RolloutDiagnosis()
    for _ in range(3):  # only the second rank has a group with two rewards, and finished completions
        diagnosis.add([facts(finished=0, varied_groups=0), facts(finished=1)], updates=1, max_new_tokens=4, rate=1e-5)
    assert diagnosis.done and (diagnosis.completions, diagnosis.finished, diagnosis.varied) == (48, 3, 3)


def test_the_kl_of_a_warm_up_is_not_looked_at():
    diagnosis = RolloutDiagnosis()
    for updates in range(1, 8):
        diagnosis.add([facts(difference=0.0)], updates, max_new_tokens=4, rate=1e-9, warms_up=True)
    assert not diagnosis.kl_known
    with pytest.warns(UserWarning, match="the KL to the reference is 0 after 8 updates"):
        diagnosis.add([facts(difference=0.0)], 8, max_new_tokens=4, rate=1e-6)


def zero(completions, **kwargs):
    return [0.0] * len(completions)


def test_a_judge_that_ranks_learns_from_completions_with_one_reward(ending, tmp_path):
    def longer(prompts, completions, opponents):
        return [float(str(a) > str(b)) for a, b in zip(completions, opponents, strict=True)]

    longer.pairwise = True
    options = dict(data=chat(), max_new_tokens=12, kl_coef=0.0, ranking_judge=longer, rewards=[zero])
    assert signs("OnlineDPO", ending, tmp_path, **options) == []


def test_a_warm_up_is_not_a_learning_rate_that_moves_nothing():
    weights = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    check = MovementCheck()
    for rate in [0.0, 1e-4, 1e-3, 1e-3, 1.0]:
        optimizer.param_groups[0]["lr"] = rate
        weights.grad = torch.full_like(weights, 0.1)
        before = check.before(optimizer)
        optimizer.step()
        check.after(optimizer, before)
    assert check.done and check.unmoved == 0


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("the film was", True),
        ("<|user|> the film was<eos>\n<|assistant|> ", False),
        ([{"role": "user", "content": "the film was"}], False),
    ],
    ids=str,
)
def test_plain_text_for_a_chat_model(prompt, plain, ending, tmp_path):
    data = lit_rlhf.PromptData(train=[{"prompt": prompt}] * 8, batch_size=4)
    assert ("plain text" in signs("RLOO", ending, tmp_path, data=data, steps=1)) == plain
    tokenizer = make_tokenizer(chat=False)
    policy = lit_rlhf.Policy.from_pretrained(str(ending))
    policy.tokenizer = tokenizer
    if isinstance(prompt, str):
        module = lit_rlhf.RLOO(policy, rewards=[vowels], sampling=lit_rlhf.Sampling(max_new_tokens=4))
        make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)


def test_text_that_is_meant_to_be_continued(tiny, tmp_path):
    rows = [{"text": f"the film {i} was long and rather nice"} for i in range(12)]
    for transform, expected in [(FirstWords(), []), (FirstWords().__call__, ["plain text"])]:
        data = lit_rlhf.PromptData(train=rows, batch_size=4, transform=transform)
        assert signs("RLOO", tiny, tmp_path, data=data, max_new_tokens=2) == expected


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=str)
def test_an_algorithm_from_a_checkpoint_has_the_trained_weights(lora, ending, tmp_path):
    module = make_module("RLOO", ending, lora=lora)
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(module, make_data("RLOO"))
    trainer.save_checkpoint(tmp_path / "made.ckpt")
    path = tmp_path / "made.ckpt"
    with pytest.raises(TypeError, match=r"holds weights and progress, not options: RLOO.load_from_checkpoint\(path, p"):
        lit_rlhf.RLOO.load_from_checkpoint(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = lit_rlhf.RLOO.load_from_checkpoint(path, policy=str(ending), rewards=[vowels], lora=lora)
        if lora:
            with pytest.raises(ValueError, match="the checkpoint has no weights for"):
                lit_rlhf.RLOO.load_from_checkpoint(path, policy=str(ending), rewards=[vowels])
    before, after = module.policy.state_dict(), loaded.policy.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name].cpu(), after[name]) for name in before)


@pytest.mark.parametrize("name", ["RLOO", "SFT", "DPO"])
@pytest.mark.filterwarnings("ignore")
def test_a_loader_of_rows_is_refused(name, ending, tmp_path):
    loader = torch.utils.data.DataLoader([{"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}] * 4)
    with pytest.raises(TypeError, match=rf"{name} takes batches of type lit_rlhf.types.*yields dict: give the"):
        make_trainer(tmp_path, max_steps=1).fit(make_module(name, ending), loader)
