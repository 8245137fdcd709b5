"""Makes vLLM find the compiled code of a model again that an earlier start saved, on a CPU.

vLLM saves what torch compiled of a model and loads it at the next start. After loading it calls `finalize_loading`,
which its own backend's code has. On a CPU torch's inductor compiles the model, and what torch loads of that is a plain
function: the load fails (vLLM 0.32, `compilation/decorators.py`, `_try_load_aot_compiled_fn`), and the model is
compiled at every start. That function is complete as it is, so the call has nothing to do.

As nothing was ever loaded, the key of what was saved lacks what such code depends on: the processor, which a folder of
caches may be shared by several of, and this package's kernels, whose tensors it names. Which of the saved folders stay
is up to `kept_code`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from maskgen.core.digest import digest_files, digest_json
from sparse_serve.plugin import kept_code
from sparse_serve.runtime import machine
from sparse_serve.tuning.selection import code_files

logger = init_logger("vllm.sparse_serve")  # vLLM prints only loggers below its own name

_FINISH = "finalize_loading"


def register() -> None:
    """Mend the loading and the key, once per process; without, a model is compiled at every start.

    Not where nothing is compiled (`TORCHDYNAMO_DISABLE=1`), as importing torch's compiler takes seconds; nor where
    torch puts weights into the code (`TORCHINDUCTOR_FREEZING=1`): those of a dense model are not in the key.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return
    try:
        _mend()
    except (ImportError, AttributeError) as error:
        logger.warning("compiled models are not found again at the next start: %s", error)


def _mend() -> None:
    import torch._inductor.config
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Saved
    from vllm.compilation import caching, decorators

    load: Any = Saved.deserialize_compile_artifacts
    if hasattr(load, "__wrapped__") or torch._inductor.config.freezing:
        return
    key, look = caching.aot_compile_hash_factors, decorators._try_load_aot_compiled_fn

    @wraps(load.__func__)  # the saved file names this method
    def loaded(cls: type[Any], data: bytes) -> Callable[..., Any]:
        compiled: Callable[..., Any] = load.__func__(cls, data)
        if not hasattr(compiled, _FINISH):
            setattr(compiled, _FINISH, _nothing)
        return compiled

    @wraps(key)
    def with_ours(vllm_config: Any) -> list[str]:
        ours = [machine.version("sparse-serve"), digest_files(code_files()), machine.features()]
        return [*key(vllm_config), digest_json(ours)]

    @wraps(look)
    def looked(model: Any, path: str) -> Any:
        folder = Path(path).parents[1]  # of all ranks
        try:
            kept_code.use(folder)
        except OSError as error:
            logger.warning("what was compiled before is not tidied up: %s", error)
        return look(model, path)

    Saved.deserialize_compile_artifacts = classmethod(loaded)  # type: ignore[assignment]
    caching.aot_compile_hash_factors = with_ours
    decorators._try_load_aot_compiled_fn = looked


def _nothing(vllm_config: Any) -> None:
    """What is left to do of a function that torch has loaded whole."""
