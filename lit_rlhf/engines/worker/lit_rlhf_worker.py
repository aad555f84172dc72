"""The worker extension that renews the weights of a vLLM server. It runs in vLLM's environment, without this package.

`vllm serve ... --worker-extension-cls lit_rlhf_worker.WeightRenewal`, with this file's folder in `PYTHONPATH`.
"""

import uuid
from pathlib import Path
from typing import Any


class WeightRenewal:
    """Methods that vLLM adds to its workers, to be called by `/collective_rpc`.

    Every start of the server has another `instance`, so a client notices a restart, after which the weights are those
    that the server was started with, and there is no `version`.
    """

    def lit_rlhf_describe(self) -> dict[str, Any]:
        """Return which weights the worker has, and of what model."""
        state: Any = self
        if not hasattr(state, "lit_rlhf_instance"):
            state.lit_rlhf_instance, state.lit_rlhf_version = uuid.uuid4().hex, ""
        config = state.model_runner.model_config.hf_text_config
        shape = {name: getattr(config, name, None) for name in SHAPE}
        dtype = str(state.model_runner.model_config.dtype).removeprefix("torch.")
        return {"instance": state.lit_rlhf_instance, "version": state.lit_rlhf_version, "dtype": dtype, "model": shape}

    def lit_rlhf_renew(self, folder: str, version: str) -> dict[str, Any]:
        """Load the weights of a model's folder in place; return an `error` if that fails.

        Args:
            folder: The folder.
            version: Name of these weights.
        """
        state: Any = self
        self.lit_rlhf_describe()
        state.lit_rlhf_version = ""
        if not Path(folder, "config.json").is_file():
            return {"error": f"the server finds no model in {folder}"}
        try:
            state.model_runner.reload_weights(weights_path=folder)
            lay_out_again(state.model_runner.get_model())
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        state.lit_rlhf_version = version
        return self.lit_rlhf_describe()


SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""Fields of a configuration that two models of one architecture share."""


def lay_out_again(model: Any) -> None:
    """Lay out a tied output layer anew on a CPU, where it keeps a copy of its old weights in another layout."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and type(layer).__name__ in ("ParallelLMHead", "VocabParallelEmbedding"):
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
