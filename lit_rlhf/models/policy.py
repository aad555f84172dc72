"""The policy: a causal language model that samples and scores completions, computing each prompt once.

The k completions of a prompt share it: its keys and values are computed in a batch of n rows and repeated k times, in
sampling and, with gradient through the cache, in scoring. Log-probabilities are computed from hidden states in chunks,
so that the logits of all positions are never held at once. A probe on first use finds out whether a model allows both
(it may have no cache, or scale or cap its logits); if not, the plain forward pass is used, and the log says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.models.adapters import add_lora, check_adapted, merged, save_adapter
from lit_rlhf.models.decoders import CachedDecoder, PlainDecoder, in_step, prepared_linears
from lit_rlhf.models.fingerprint import fingerprint
from lit_rlhf.models.forward import ModelForward, eval_mode
from lit_rlhf.models.loading import (
    add_stop_id,
    check_causal,
    check_decoder,
    check_vocabulary,
    disable_dropout,
    end_of_sequence_ids,
    load_causal_lm,
    make_savable,
    unwrapped,
)
from lit_rlhf.models.logprobs import completion_logprobs
from lit_rlhf.models.out_of_memory import FittingRows
from lit_rlhf.models.pretrained import processor_files
from lit_rlhf.models.probe import probe_policy
from lit_rlhf.models.sampling import Sampling, counter_based_uniform, decode, join_completions, with_greedy_rows
from lit_rlhf.models.sharding import ShardedWeights, Sharding
from lit_rlhf.models.shared_prompt import TokenSequences, completion_features, fill_padding, score_in_parts
from lit_rlhf.models.stop_strings import StopStrings
from lit_rlhf.tokenization import end_of_turn
from lit_rlhf.types import Completions, Prompts


class Policy(nn.Module):
    """A causal language model with its tokenizer.

    Args:
        model: A `transformers` causal language model, or a PEFT model around one, compiled or not. Its weights are
            trained where they require gradient. Its dropout is switched off.
        tokenizer: Its tokenizer.
        lora: Options of `peft.LoraConfig` to train a new adapter instead of the weights (`{}` for PEFT's defaults).

    Raises:
        ValueError: If the tokenizer does not fit the model, the model is no decoder, or LoRA is asked for on top of an
            adapter.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel | OptimizedModule,
        tokenizer: PreTrainedTokenizerBase,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        model = cast(PreTrainedModel | PeftModel, unwrapped(model))
        check_vocabulary(model, tokenizer)
        if isinstance(model, PeftModel):
            check_adapted(model)
        self.new_adapter = lora is not None
        self.start = fingerprint(model)  # of the reference
        self.model = model if lora is None else add_lora(model, lora)
        check_decoder(self.causal_lm)
        self.tokenizer = tokenizer
        self.loaded = False  # whether the base model can be read again from its source
        self.processor_files = processor_files(self.causal_lm.config, local_files_only=True)
        self.model_forward = ModelForward(self.causal_lm)
        self._sampling_rows = FittingRows("sampling", "a smaller --model.sampling.batch_size")
        self._scoring_rows = FittingRows("scoring")
        disable_dropout(self.model)
        self.train()  # Lightning warns of modules in evaluation mode
        self.eos_ids = end_of_sequence_ids(self.causal_lm, tokenizer)
        if (turn := end_of_turn(tokenizer)) is not None and self.causal_lm.can_generate():
            add_stop_id(self.causal_lm.generation_config, turn)  # so that an export ends its turns, too
        if self.causal_lm.can_generate():
            make_savable(self.causal_lm.generation_config)

    @classmethod
    def from_pretrained(cls, source: str | Path, lora: dict[str, Any] | None = None, **options: Any) -> Policy:
        """Load a policy from a hub id or a folder: a causal language model, or a PEFT adapter of one.

        Args:
            source: The hub id or folder; `testbed` for the shipped one.
            lora: See the class.
            **options: Options of `from_pretrained` of `transformers`, which reach the tokenizer and an adapter, too.
                Weights load in float32 by default (`dtype`). Code in the folder is run only with
                `trust_remote_code=True`, and pickled weights are read only with `use_safetensors=False`.

        Raises:
            ValueError: If it can't be loaded with all its weights, or is no causal language model.
        """
        model, tokenizer, as_saved = load_causal_lm(source, **options)
        policy = cls(model, tokenizer, lora)
        policy.loaded = as_saved
        policy.processor_files = processor_files(policy.causal_lm.config, **options)
        return policy

    @property
    def causal_lm(self) -> Any:
        """The `transformers` model itself, inside the PEFT model if there is one."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def save(self, folder: str | Path) -> None:
        """Write a folder that `transformers` (or PEFT, for an adapter) loads, tokenizer and chat template included.

        An adapter is merged if its base model was given in memory, and so is in no folder.
        """
        if isinstance(self.model, PeftModel) and self.loaded:
            save_adapter(self.model, folder)
        else:
            model = merged(self.model) if isinstance(self.model, PeftModel) else self.model
            model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        for name, content in self.processor_files.items():
            Path(folder, name).write_bytes(content)

    def save_whole(self, folder: str | Path) -> None:
        """Write a folder of the whole model, an adapter merged into it."""
        model = merged(self.model) if isinstance(self.model, PeftModel) else self.model
        model.save_pretrained(str(folder))

    # Sampling

    @torch.no_grad()
    def sample(
        self,
        prompts: Prompts,
        num_samples: int,
        sampling: Sampling,
        seed: int = 0,
        epoch: int = 0,
        with_greedy: bool = False,
    ) -> Completions:
        """Sample completions of each prompt.

        Args:
            prompts: The prompts.
            num_samples: Completions of each prompt, k.
            sampling: The options.
            seed: Key of the sampling noise, with `epoch` and the prompts' `index`: the same key gives the same
                completions, whatever else is in the batch.
            epoch: See `seed`.
            with_greedy: Whether each prompt gets one more completion, the last, of its most likely tokens.
        """
        self.probe()
        width, length = num_samples + with_greedy, sampling.max_new_tokens

        def sample(rows: slice) -> Completions:
            part, noise = fill_padding(prompts.rows(rows).trim()), None
            if not sampling.greedy:
                noise = counter_based_uniform(seed, epoch, part.index.tolist(), num_samples, length)
                noise = with_greedy_rows(noise, num_samples) if with_greedy else noise
            return self._sample(part, width, sampling, noise)

        with (
            self.model_forward.without_gradient(),
            eval_mode(self.model),
            prepared_linears(self.model),
        ):  # a model that checkpoints keeps no cache in training
            if self.model_forward.in_step:
                return sample(slice(None))
            parts = self._sampling_rows.in_parts(sample, len(prompts), width, sampling.batch_size)
        return parts[0] if len(parts) == 1 else join_completions(parts)

    def _sample(self, prompts: Prompts, k: int, sampling: Sampling, noise: Tensor | None) -> Completions:
        decoder = (CachedDecoder if self.shares_prompt else PlainDecoder)(self.model_forward, prompts, k)
        eos = torch.tensor(self.eos_ids, dtype=torch.long, device=prompts.tokens.device)
        stops = StopStrings(self.tokenizer, sampling.stop) if sampling.stop else None
        with in_step(decoder, self.model_forward) as together:
            return decode(together, (len(prompts), k), noise, sampling, eos, stops)

    # Scoring

    def logprobs(
        self, prompts: Prompts, completions: TokenSequences, temperature: float = 1.0
    ) -> Float[Tensor, "prompts samples tokens"]:
        """Return the log-probability of each completion token, in nats, at least float32, 0 where masked.

        Differentiable: the gradient runs through the shared prompt too.
        """
        self.probe()

        def logprobs(prompts: Prompts, completions: TokenSequences) -> Tensor:
            return self.logprobs_from(self._features(prompts, completions), completions, temperature)

        return score_in_parts(self.model_forward, self._scoring_rows, logprobs, prompts, completions)

    def logprobs_from(
        self,
        features: Float[Tensor, "prompts samples tokens features"],
        completions: TokenSequences,
        temperature: float = 1.0,
    ) -> Float[Tensor, "prompts samples tokens"]:
        """Return the log-probabilities of completion tokens, as `logprobs` does, from precomputed features."""
        return completion_logprobs(self.model_forward, features, completions.tokens, completions.mask, temperature)

    def features(
        self, prompts: Prompts, completions: TokenSequences
    ) -> Float[Tensor, "prompts samples tokens features"]:
        """Return the features before each token of the completions: hidden states, or logits. Differentiable."""
        self.probe()
        return score_in_parts(self.model_forward, self._scoring_rows, self._features, prompts, completions)

    def _features(self, prompts: Prompts, completions: TokenSequences) -> Tensor:
        return completion_features(self.model_forward, prompts, completions)

    # Fast paths

    def probe(self) -> None:
        """Find out, once, whether this model allows chunked logits and a shared prompt; log the reason if not."""
        if self.model_forward.shares_prompt is not None:
            return
        with self.model_forward.without_gradient():
            with eval_mode(self.model), self.model_forward.fast_attention(), self.model_forward.own_precision():
                check_causal(self.causal_lm)
            probe_policy(self.model_forward)

    def shard(self, sharding: Sharding) -> None:
        """Shard the weights over ranks, once. A reference must have been copied before."""
        if self.model_forward.sharded is None:
            self.model_forward.sharded = ShardedWeights(self, sharding, ["_features"])
            self.start = sharding.from_first(self.start)

    @property
    def chunks_logits(self) -> bool:
        """Whether features are hidden states, whose logits are computed in chunks; False before `probe`."""
        return bool(self.model_forward.head_apart)

    @property
    def shares_prompt(self) -> bool:
        """Whether each prompt is computed once for all its completions; False before `probe`."""
        return bool(self.model_forward.shares_prompt)
