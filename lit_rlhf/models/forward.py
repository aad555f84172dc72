"""The forward pass that policies, decoders, critics and reward models use: features of the last columns of a batch."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_rlhf.models.cpu import cpu_attention
from lit_rlhf.models.offload import OffloadedWeights
from lit_rlhf.models.recompute import checkpointed_layers, recomputed
from lit_rlhf.models.sharding import ShardedWeights


class ModelForward:
    """The forward pass of a `transformers` model.

    Its features are the last hidden states if the head can be applied separately (by `project`), otherwise the model's
    own logits. `lit_rlhf.models.probe` determines which of the two a model allows, and whether the completions of a
    prompt can share its computation.

    Args:
        model: The model with its head, not wrapped by PEFT.
        head: Name of the attribute that holds the head; by default the output embeddings.

    Attributes:
        head_apart: Whether features are hidden states; None until it is known.
        shares_prompt: Whether a prompt is computed once for all its completions; None until it is known.
        sharded: The weights, if they are sharded over ranks.
        offloaded: The weights, if they are in main memory between uses.
        recomputed: Layers that a backward pass computes again, instead of keeping their activations.
    """

    def __init__(self, model: Any, head: str | None = None) -> None:
        self.model = model
        self.head_name = head
        self.head_apart: bool | None = None
        self.shares_prompt: bool | None = None
        self.sharded: ShardedWeights | None = None
        self.offloaded: OffloadedWeights | None = None
        self.recomputed: list[GradientCheckpointingLayer] = []

    @property
    def in_step(self) -> bool:
        """Whether a pass takes all ranks together: the weights are sharded, and not gathered now."""
        return self.sharded is not None and not self.sharded.is_gathered

    def gathered(self) -> AbstractContextManager[None]:
        """Return a context in which this rank holds all weights on its device. Enter it on all ranks."""
        if self.offloaded is not None:
            return self.offloaded.in_use()
        return contextlib.nullcontext() if self.sharded is None else self.sharded.gathered()

    def without_gradient(self) -> AbstractContextManager[None]:
        """Return a context for passes without gradient; see `ShardedWeights`. Enter it on all ranks."""
        return self.gathered() if self.sharded is None else self.sharded.without_gradient()

    def own_precision(self) -> AbstractContextManager[None]:
        """Return a context without autocast, except for layers whose weights are gathered in 16 bits: they need it."""
        dtype = None if self.sharded is None else self.sharded.sharding.precision.param_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    @property
    def trunk(self) -> nn.Module:
        """The model without its head."""
        return cast(nn.Module, self.model.base_model)

    @property
    def head(self) -> nn.Module:
        """The layer that turns hidden states into logits or scores."""
        head = self.model.get_output_embeddings() if self.head_name is None else getattr(self.model, self.head_name)
        return cast(nn.Module, head)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @functools.cached_property
    def _last_position(self) -> int | None:
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return None if limit is None else int(limit) - 1

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return cast(torch.device, next(self.model.parameters()).device)

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model embeds."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def __call__(
        self,
        ids: Int[Tensor, "rows columns"],
        mask: Bool[Tensor, "rows past_and_columns"],
        positions: Int[Tensor, "rows columns"],
        cache: DynamicCache | None,
        keep: int,
    ) -> Float[Tensor, "rows keep features"]:
        """Return the features of the last `keep` columns; with a cache, `ids` continue the cached columns."""
        arguments = self._arguments(ids, mask, positions, cache)
        with self.fast_attention(), self.checkpointed():
            if self.head_apart:
                hidden: Tensor = self.trunk(**arguments).last_hidden_state
                return hidden[:, -keep:]
            if forward_accepts(type(self.model).forward, "logits_to_keep"):
                arguments["logits_to_keep"] = keep
            logits: Tensor = self.model(**arguments).logits
            return logits[:, -keep:]

    def project(self, features: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs"]:
        """Turn features into the head's outputs."""
        return cast(Tensor, self.head(features)) if self.head_apart else features

    def fast_attention(self) -> AbstractContextManager[None]:
        """Return a context in which attention is fast on a CPU, and right on CUDA (see `without_cudnn_attention`).

        Gradient checkpointing repeats the forward pass outside the context: on a CPU it is then PyTorch's own attention
        in both, and on CUDA cuDNN's stays off.
        """
        checkpoints = checkpoints_activations(self.model)
        if self.device.type == "cuda":
            return without_cudnn_attention(restore=not checkpoints)
        return contextlib.nullcontext() if self.device.type != "cpu" or checkpoints else cpu_attention()

    def checkpoint(self, active: bool) -> None:
        """Choose whether passes with gradient keep only the inputs of layers, which are then computed again.

        Raises:
            ValueError: If the model has no layers for it.
        """
        self.recomputed = checkpointed_layers(self.model) if active else []

    def checkpointed(self) -> AbstractContextManager[None]:
        """Return a context for a pass through the layers, in which those to compute again keep only their input."""
        if not self.recomputed or not torch.is_grad_enabled():
            return contextlib.nullcontext()
        return recomputed(self.recomputed, self._second_pass)

    @contextlib.contextmanager
    def _second_pass(self, layer: nn.Module) -> Iterator[None]:
        with eval_mode(layer), self.fast_attention():
            yield

    def _arguments(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None) -> dict[str, Any]:
        forward = type(self.trunk).forward
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": cache is not None}
        if cache is not None:  # transformers 5.24 has renamed the argument
            arguments["cache" if forward_accepts(forward, "cache") else "past_key_values"] = cache
        if forward_accepts(forward, "position_ids"):
            # every row fits, but the padding of a short completion after a long prompt may not
            last = self._last_position
            arguments["position_ids"] = positions if last is None else positions.clamp(max=last)
        return arguments


@contextlib.contextmanager
def without_cudnn_attention(restore: bool = True) -> Iterator[None]:
    """Turn cuDNN's attention off within this context, unless the user has chosen a backend.

    PyTorch 2.11 to 2.13 prefer it on H100 and newer, where its gradients of padded rows can be NaN, and it builds a
    plan for every new shape: at each token of a decoding. A choice is the variable TORCH_CUDNN_SDPA_DEPRIORITIZED, or
    any backend that is off, as within `torch.nn.attention.sdpa_kernel`. To use cuDNN, turn another one off.

    Args:
        restore: Whether to turn it on again afterwards.
    """
    cuda: Any = torch.backends.cuda
    enabled = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled)
    if "TORCH_CUDNN_SDPA_DEPRIORITIZED" in os.environ or not all(is_on() for is_on in enabled):
        yield
        return
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if restore:
            cuda.enable_cudnn_sdp(True)


@functools.cache
def forward_accepts(forward: Any, argument: str) -> bool:
    """Whether a model's forward has an argument of this name."""
    return argument in inspect.signature(forward).parameters


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether gradient checkpointing is active; `transformers` then keeps no cache."""
    return model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def as_sampled(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context with the model in evaluation mode, as in sampling: without dropout or router noise.

    With gradient checkpointing the mode stays, since `transformers` checkpoints in training mode only.
    """
    return contextlib.nullcontext() if checkpoints_activations(model) else eval_mode(model)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within this context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
