"""The vLLM plugin: teaches any vLLM process to serve `sparse_nm` checkpoints.

vLLM calls `register` through the entry point group `vllm.general_plugins` in every process it starts (API server,
engine core, each worker, the model inspector), so it must be cheap and idempotent. With it, a stock
`vllm serve <checkpoint>` works: `config.json` names `quant_method: sparse_nm`, and vLLM asks the class registered here.

vLLM only logs a plugin that fails to load; the run then dies with "Unknown quantization method", which is loud enough.

A version of vLLM that this release was not tested with is refused (`runtime.vllm_version`): sparse checkpoints then end
in one line, dense ones are served.

A process of vLLM's that `sparse-serve serve` started is also made to end when that server is killed (`processes`).
"""

import logging


def register() -> None:
    """Register the `sparse_nm` quantization method with the vLLM of this process."""
    from sparse_serve.runtime import processes, startup_error, vllm_version

    if not logging.getLogger().handlers:  # a process of vLLM's own, which prints only loggers below "vllm"
        logging.getLogger("sparse_serve").parent = logging.getLogger("vllm")
    processes.follow()
    startup_error.record_failed_processes()
    _allow_amx()
    if reason := vllm_version.refusal():
        from sparse_serve.plugin import refused

        refused.register(reason)
        return
    from sparse_serve.plugin import compiled_code, config, loading, lora

    config.register()
    loading.register()
    lora.register()
    compiled_code.register()


def _allow_amx() -> None:
    """Ask Linux for AMX's tiles: it kills a process that uses them without having asked.

    Without this, a prompt of two tokens ended the engine of a small dense bfloat16 model with an illegal instruction,
    in the CPU wheel of vLLM 0.32.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
