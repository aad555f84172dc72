"""Losses of the GRPO family, OnlineDPO and KTO against those of TRL, on the same rows.

Skipped where TRL is not installed: pip install trl==1.16.0
"""

from copy import deepcopy

import pytest
import torch
from datasets import Dataset

import lit_rlhf
from enumerable import make_completions, make_prompts, plain_logprobs
from enumeration import ALL, BETA, LENGTH, PROMPT, flat_gradient, make_module, sequence_reward
from runs import make_data, make_trainer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

GROUP = [ALL[4], ALL[1], ALL[5], ALL[0]]
CASES = {
    "GRPO": (dict(kl_coef=BETA), dict(loss_type="grpo")),
    "DrGRPO": (dict(kl_coef=0.0), dict(loss_type="dr_grpo", scale_rewards="none")),
    "DAPO": (dict(kl_coef=0.0), dict(loss_type="dapo", epsilon_high=0.28)),
    "GSPO": (
        dict(kl_coef=0.0, clip_range=0.7, clip_range_high=0.45),
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=0.7, epsilon_high=0.45),
    ),
    "CISPO": (dict(kl_coef=0.0, clip_range_high=0.1), dict(loss_type="cispo", epsilon_high=1.1)),
}
"""Options here, and TRL's for the same method. TRL's upper bound of CISPO is that of the weight itself."""


def trl_loss(module, options, folder, old) -> torch.Tensor:
    """Return TRL's loss of the module's rollout, with its advantages."""
    settings = dict(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        per_device_train_batch_size=len(GROUP), num_generations=len(GROUP), max_completion_length=LENGTH,
        use_bias_correction_kl=False, epsilon=0.2,
    )  # fmt: skip
    model = module.policy.causal_lm
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=trl.GRPOConfig(**{**settings, **options}),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * len(GROUP)),
        processing_class=module.tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.beta = module.kl_coef  # set later, so that it loads no reference
    completions, count = module.rollout.completions, len(GROUP)
    prompt = torch.tensor([PROMPT] * count)
    width = completions.tokens.shape[-1]
    reference = [plain_logprobs(module.initial, PROMPT, y).detach() for y in GROUP]

    def padded(rows):
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])

    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completions.tokens[0],
        "completion_mask": completions.mask[0].long(),
        "advantages": module.rollout.advantages[0],
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(reference),
        "num_items_in_batch": completions.mask.sum(),
    }
    model.train()  # there is no dropout
    return trainer._compute_loss(model, inputs)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_those_of_trl_in_the_second_update(name, tmp_path):
    options, theirs = CASES[name]
    module = make_module(getattr(lit_rlhf, name), num_samples=4, update_epochs=2, **options)
    prompts = make_prompts(PROMPT)
    completions = make_completions(module.policy, prompts, [GROUP])
    module.sample = lambda prompts: completions
    old = [plain_logprobs(module.policy.causal_lm, PROMPT, y).detach() for y in GROUP]
    for step in range(2):
        if step == 1:
            torch.manual_seed(0)
            for parameter in module.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        module.zero_grad()
        module.training_step(prompts, step).backward()
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
    actual = flat_gradient(module)
    module.zero_grad()
    trl_loss(module, theirs, tmp_path, old).backward()
    expected = flat_gradient(module)
    assert expected.norm() > 1e-2
    assert (actual - expected).norm() < 1e-5 * expected.norm()  # TRL computes log-probabilities in float32


PAIRS = [[ALL[1], ALL[4]], [ALL[0], ALL[5]]]


def backward_of_trl_online_dpo(module, prompts, completions, folder) -> None:
    """Add the gradient of TRL's step on these pairs."""
    online_dpo = pytest.importorskip("trl.experimental.online_dpo")
    model = module.policy.causal_lm
    trainer = online_dpo.OnlineDPOTrainer(
        model=model,
        ref_model=module.initial,
        reward_funcs=sequence_reward,
        args=online_dpo.OnlineDPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
            per_device_train_batch_size=len(PAIRS), beta=module.beta,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * len(PAIRS)),
        processing_class=module.tokenizer,
    )  # fmt: skip
    trainer._calculate_rewards_from_functions = lambda **kwargs: torch.tensor(
        sequence_reward(completion_ids=[y for column in zip(*PAIRS, strict=True) for y in column])
    )  # TRL's own passes padding to the reward
    tokens, mask = (x.transpose(0, 1).flatten(0, 1) for x in (completions.tokens, completions.mask.long()))
    generated = prompts.tokens.repeat(2, 1), prompts.mask.repeat(2, 1).long(), tokens, mask, None
    trainer._generate = lambda *args: generated
    trainer.training_step(model, {"prompt": ["a"] * len(PAIRS)})


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_gradient_of_online_dpo_equals_that_of_trl(beta, tmp_path):
    module = make_module(lit_rlhf.OnlineDPO, num_samples=2, kl_coef=0.0, beta=beta)
    prompts = make_prompts(PROMPT, [2, 1, 1])
    completions = make_completions(module.policy, prompts, PAIRS)
    module.sample = lambda prompts: completions
    module.zero_grad()
    module.training_step(prompts, 0).backward()
    module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
    actual = flat_gradient(module)
    assert module.rollout.advantages.tolist() == [[-1.0, 1.0], [1.0, -1.0]]
    module.zero_grad()
    backward_of_trl_online_dpo(module, prompts, completions, tmp_path)
    expected = flat_gradient(module)
    assert expected.norm() > 1e-2
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def trl_kto_loss(module, models, batch, folder) -> torch.Tensor:
    """Return TRL's loss of a batch of two rows: with more, it pairs completions with other prompts than here."""
    arguments = trl.KTOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2,
        gradient_checkpointing=False, beta=module.beta, desirable_weight=2.0, undesirable_weight=0.5,
    )  # fmt: skip
    rows = [{"prompt": "a", "completion": "b", "label": i == 0} for i in range(2)]
    model, reference = models
    trainer = trl.KTOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=module.tokenizer,
    )
    prompts, inputs = batch.prompts, {"label": torch.tensor(batch.prompts.columns["label"])}
    for prefix, order in (("", [0, 1]), ("KL_", [1, 0])):
        tokens, mask = batch.tokens[order, 0], batch.mask[order, 0]
        inputs[f"{prefix}input_ids"] = torch.cat([prompts.tokens, tokens], 1)
        inputs[f"{prefix}attention_mask"] = torch.cat([prompts.mask, mask], 1).long()
        inputs[f"{prefix}completion_mask"] = torch.cat([torch.zeros_like(prompts.mask), mask], 1).long()
    model.train()
    return trainer._compute_loss(model, inputs, return_outputs=False)


def test_loss_and_gradient_of_kto_equal_those_of_trl(tiny, tmp_path):
    seen = []

    class Compared(lit_rlhf.KTO):
        def training_step(self, batch, batch_idx):
            models = deepcopy(self.policy.causal_lm), lit_rlhf.Policy.from_pretrained(str(tiny)).causal_lm
            loss = super().training_step(batch, batch_idx)
            own = torch.autograd.grad(loss, list(self.policy.causal_lm.parameters()), retain_graph=True)
            with torch.enable_grad():
                theirs = trl_kto_loss(self, models, batch, tmp_path)
                gradient = torch.autograd.grad(theirs, list(models[0].parameters()))
            flat = [torch.cat([part.flatten() for part in parts]) for parts in (own, gradient)]
            seen.append((loss.detach(), theirs.detach(), *flat))
            return loss

    def adam(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2)

    module = Compared(str(tiny), desirable_weight=2.0, undesirable_weight=0.5, optimizer=adam)
    trainer = make_trainer(tmp_path, max_steps=3, limit_val_batches=0)
    trainer.fit(module, make_data("KTO", batch_size=2))
    for loss, theirs, own, gradient in seen:
        assert torch.allclose(loss, theirs, atol=1e-5)
        assert gradient.norm() > 1e-3
        assert (own - gradient).norm() < 1e-4 * gradient.norm()
    assert not torch.equal(seen[0][2], seen[2][2])
