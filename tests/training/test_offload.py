"""Offloaded models: they are on the device exactly while they are used, and what is learned is the same.

There is one kind of memory here, so the main memory's part is played by numbers: while a model is not in use, its
weights are NaN.
"""

import contextlib

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import lit_rlhf
from lit_rlhf.algorithms import vanilla_pg
from lit_rlhf.errors import InputError
from lit_rlhf.models.offload import OffloadedWeights, check_offload, in_main_memory
from runs import make_data, make_module, make_trainer, training_state
from tiny import make_llama, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:offload.* has no effect")


def spoil(tensor):
    if tensor.is_floating_point():
        tensor.data = torch.full_like(tensor, torch.nan)


@pytest.fixture
def spoiled(monkeypatch):
    """Make weights NaN that are not in use; return the number of models that are offloaded."""
    used, leave, build = [], OffloadedWeights._leave, OffloadedWeights.__init__

    def init(self, *args, **kwargs):
        used.append(self)
        build(self, *args, **kwargs)

    def spoiling(self):
        leave(self)
        for tensor, _ in self._kept:
            spoil(tensor)

    monkeypatch.setattr(OffloadedWeights, "__init__", init)
    monkeypatch.setattr(OffloadedWeights, "_leave", spoiling)
    return used


def fit(name, folder, root, **options):
    module, trainer = make_module(name, folder, **options), make_trainer(root, max_steps=3)
    trainer.fit(module, datamodule=make_data(name))
    return module, trainer


def assert_equal(one, other):
    left, right = training_state(one), training_state(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    kinds = "train/", "val/"
    for name in (n for n in one.callback_metrics if n.startswith(kinds)):
        assert torch.equal(one.callback_metrics[name], other.callback_metrics[name]), name


@pytest.mark.parametrize("name", ["RLOO", "GRPO", "PPO", "DPO", "IPO"])
def test_an_offloaded_reference_gives_the_same_run(name, tiny, tmp_path, spoiled):
    _, plain = fit(name, tiny, tmp_path)
    module, trainer = fit(name, tiny, tmp_path, offload_reference=True)
    assert len(spoiled) == 1 and module.reference.copy.causal_lm.lm_head.weight.isnan().all()
    assert_equal(plain, trainer)


def test_weights_that_the_reference_shares_with_the_policy_stay(tiny, tmp_path, spoiled):
    def module(**options):
        policy = lit_rlhf.Policy.from_pretrained(tiny)
        policy.causal_lm.model.embed_tokens.requires_grad_(False)
        return lit_rlhf.RLOO(policy, rewards=[lit_rlhf.rewards.Length(maximum=3)], num_samples=2, **options)

    trainers = [make_trainer(tmp_path, max_steps=2) for _ in range(2)]
    for trainer, options in zip(trainers, [{}, {"offload_reference": True}], strict=True):
        trainer.fit(module(**options), datamodule=make_data("RLOO"))
    assert spoiled
    assert_equal(*trainers)


def test_an_offloaded_reward_model_gives_the_same_scores(tiny, tmp_path, spoiled):
    tokenizer, folder = make_tokenizer(), tmp_path / "judge"
    config = make_llama(len(tokenizer)).config
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain, offloaded = (lit_rlhf.RewardModel(folder, offload=choice) for choice in (False, True))
    prompts, completions = ["a b", "a b", "c"], ["d", "e f", "g"]
    assert torch.equal(plain(prompts, completions), offloaded(prompts, completions))
    assert len(spoiled) == 1 and all(p.isnan().all() for p in offloaded._scorer.parameters())
    _, one = fit("RLOO", tiny, tmp_path, rewards=[plain])
    _, other = fit("RLOO", tiny, tmp_path, rewards=[offloaded])
    assert_equal(one, other)


@pytest.mark.parametrize("name", ["VanillaPG", "PPO"])
def test_an_offloaded_critic_gives_the_same_run(name, tiny, tmp_path, monkeypatch):
    _, plain = fit(name, tiny, tmp_path)
    uses = []

    @contextlib.contextmanager
    def spoiling(critic, optimizer):
        with in_main_memory(critic, optimizer):
            states = [optimizer.state.get(p, {}) for p in critic.parameters()] if optimizer else []
            tensors = [*critic.parameters(), *(v for state in states for v in state.values())]
            kept = [tensor.data for tensor in tensors]
            for tensor in tensors:
                spoil(tensor)
            yield
            for tensor, values in zip(tensors, kept, strict=True):
                tensor.data = values
        uses.append(len(tensors))

    monkeypatch.setattr(vanilla_pg, "in_main_memory", spoiling)
    module, trainer = fit(name, tiny, tmp_path, offload_critic=True)
    count = len(list(module.critic.parameters()))
    assert uses[:2] == [count, count] and set(uses[2:]) == {4 * count}  # validation and rollout before the first step
    assert_equal(plain, trainer)
    before = len(uses)
    trainer.predict(module, datamodule=make_data(name))
    assert len(uses) == before + 1


def test_the_critics_state_is_moved_and_the_policys_is_not():
    critic, policy = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW([*critic.parameters(), *policy.parameters()])
    (critic(torch.ones(2)) + policy(torch.ones(2))).sum().backward()
    optimizer.step()
    before = optimizer.state[critic.weight]["exp_avg"].clone()
    with in_main_memory(critic, optimizer):
        assert critic.weight.device == torch.device("cpu")
    assert torch.equal(optimizer.state[critic.weight]["exp_avg"], before)


def test_weights_are_in_use_until_the_outermost_use_ends(spoiled):
    layer, shared = torch.nn.Linear(2, 3), torch.nn.Parameter(torch.ones(2))
    layer.register_parameter("shared", shared)
    offloaded = OffloadedWeights(layer, "cpu", shared=[shared])

    def usable():
        return [bool(p.isfinite().all()) for p in layer.parameters()]

    for _ in range(2):
        with offloaded.in_use():
            with offloaded.in_use():
                assert usable() == [True, True, True]
            assert usable() == [True, True, True]
        assert usable() == [False, False, True]
    with pytest.raises(RuntimeError, match="planted"), offloaded.in_use():
        raise RuntimeError("planted")
    assert usable() == [False, False, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_is_given_back():
    layer = torch.nn.Linear(1024, 1024, bias=False).cuda()
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 1024, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    held, weights = torch.cuda.memory_allocated(), layer.weight.nbytes
    with in_main_memory(layer, optimizer):
        assert torch.cuda.memory_allocated() == held - 3 * weights
    assert torch.cuda.memory_allocated() == held
    offloaded = OffloadedWeights(layer, "cuda")
    assert torch.cuda.memory_allocated() == held - weights and layer.weight.is_pinned()
    with offloaded.in_use():
        assert torch.cuda.memory_allocated() == held and layer.weight.is_cuda


def test_what_can_not_be_offloaded_says_so(tiny, tmp_path):
    with pytest.raises(InputError, match="offload_reference=True needs a reference, and reference is null"):
        make_module("RLOO", tiny, kl_coef=0.0, reference=None, offload_reference=True)
    with pytest.raises(InputError, match="offload_critic=True needs a second model, and critic='head' is a head"):
        make_module("PPO", tiny, critic="head", offload_critic=True)
    message = "offload_critic is for one process, since DDP can't follow weights that move"
    with pytest.raises(InputError, match=message):
        check_offload(["offload_critic"], torch.device("cuda"), sharded=False, world_size=2)
    for name in ("offload_critic", "offload of a reward model"):
        with pytest.raises(InputError, match=f"{name} can't be combined with --trainer.strategy fsdp2"):
            check_offload([name], torch.device("cuda"), sharded=True, world_size=2)
    with pytest.raises(InputError, match="quantized weights can't be offloaded"):
        OffloadedWeights(torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1).byte(), False)]), "cpu")
    with pytest.warns(UserWarning, match="offload_reference has no effect on a CPU"):
        fit("RLOO", tiny, tmp_path, offload_reference=True)
    with pytest.warns(UserWarning, match="offload_reference has no effect: the reference is the policy with its adapt"):
        fit("RLOO", tiny, tmp_path, lora={"r": 2}, offload_reference=True)
