"""Losses of the GRPO family against those of TRL, on the same rollout; skipped where TRL is not installed.

pip install trl==1.16.0
"""

import pytest
import torch
from datasets import Dataset

import lit_rlhf
from enumerable import make_completions, make_prompts, plain_logprobs
from enumeration import ALL, BETA, LENGTH, PROMPT, flat_gradient, make_module

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
