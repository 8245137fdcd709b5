"""In place of the plugin, where this version of vLLM is refused: sparse checkpoints end in one line, all else works.

vLLM ends with what a plugin raises when it registers, whatever model it serves, so nothing is raised then. Only what
has been in vLLM for long is used: a name that has moved leaves the line in the log.
"""

import contextlib
import logging
from typing import Any

from maskgen.core.config import QUANT_METHOD
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.runtime.startup_error import record_startup_error

logger = logging.getLogger("vllm.sparse_serve")  # vLLM prints only loggers below its own name


def register(reason: str) -> None:
    """Have vLLM end with `reason` where it meets a sparse checkpoint."""
    logger.warning("%s; sparse checkpoints are refused", reason)
    with contextlib.suppress(ImportError, ValueError):  # moved, or registered before
        from vllm.model_executor.layers.quantization import register_quantization_config
        from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

        class Refused(QuantizationConfig):
            @classmethod
            @record_startup_error()
            def from_config(cls, config: dict[str, Any]) -> "Refused":
                """Called by vLLM for a checkpoint with our `quant_method`."""
                raise SettingsError(reason)

        register_quantization_config(QUANT_METHOD)(Refused)
