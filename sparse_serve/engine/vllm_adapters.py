"""LoRA adapters: what can be wrong with them is said before the model loads."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from sparse_serve.runtime.errors import SettingsError
from sparse_serve.runtime.startup_error import reason


def check(args: Namespace, config: Any) -> None:
    """Check `--enable-lora` and `--lora-modules` against vLLM's configuration of the engine. Raises `SettingsError`.

    An adapter that is a directory is checked as vLLM will when it loads it, its tensors apart. One of the hub is left
    to vLLM.
    """
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.model_loader.utils import get_model_cls
    from vllm.model_executor.models.interfaces import supports_lora

    adapters = args.lora_modules or ()
    if config.lora_config is None:
        if adapters:
            raise SettingsError(f"--lora-modules {adapters[0].name}={adapters[0].path}: needs --enable-lora too")
        return
    model_class = get_model_cls(config.model_config)
    if not supports_lora(model_class):
        raise SettingsError(
            f"--enable-lora: vLLM has no LoRA for {model_class.__name__}; leave it out, and merge the adapter into the "
            "dense model before it is pruned"
        )
    names = args.served_model_name or [args.model]
    for adapter in adapters:
        flag = f"--lora-modules {adapter.name}={adapter.path}"
        if adapter.name in names:
            raise SettingsError(f"{flag}: the served model has this name; choose another for the adapter")
        if not Path(adapter.path).is_dir():
            if adapter.path.startswith((".", "/", "~")) or adapter.path.count("/") != 1:
                raise SettingsError(f"{flag}: not a directory; expected one with adapter_config.json, or a hub's name")
            continue
        try:
            PEFTHelper.from_local_dir(adapter.path, None).validate_legal(config.lora_config)
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(f"{flag}: {reason(error)}") from error
