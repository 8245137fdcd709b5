"""Reads vLLM's flags with vLLM's own parser."""

import math
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from maskgen.core.config import CONFIG_KEY
from maskgen.core.failures import explained
from sparse_serve.engine import vllm_defaults, vllm_turns
from sparse_serve.runtime import machine
from sparse_serve.runtime.conversion import Conversion
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.runtime.startup_error import reason

CPU_SEQUENCES = 256
WORKER_EXTENSION = "sparse_serve.plugin.worker.WorkerExtension"


def parse(command: Sequence[str], drain_s: float) -> Namespace:
    """vLLM's flags, read by vLLM's own parser, with this server's defaults. Raises `SettingsError`.

    vLLM offers its flags as an argparse parser only, and its application and configuration take the namespace that
    comes out of it: hence argparse outside of the cli rooms.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise SettingsError(f"{reason(message)}; `sparse-serve vllm serve --help=all` lists vLLM's flags")

    parser = make_arg_parser(Parser(prog="sparse-serve serve"))
    defaults = parser.parse_args([])
    on_cpu = current_platform.is_cpu()
    parser.set_defaults(shutdown_timeout=math.ceil(drain_s), scheduling_policy=None)
    if on_cpu:
        parser.set_defaults(enforce_eager=None)
    args = parser.parse_args(list(command))
    vllm_defaults.check_flags(args, defaults, os.environ)
    vllm_defaults.check_tracing(args)
    args.model = args.model_tag or args.model
    args.worker_extension_cls = WORKER_EXTENSION
    vllm_turns.set_policy(args)
    if on_cpu:
        if args.max_num_seqs is None:  # vLLM's 128 are what one client may have: another would wait for all of them
            args.max_num_seqs = min(CPU_SEQUENCES, args.max_num_batched_tokens or CPU_SEQUENCES)
        obstacle = vllm_defaults.no_compiling(args, os.environ)
        if args.enforce_eager is None:
            args.enforce_eager = obstacle is not None
        vllm_defaults.check_cpu(args, obstacle)
        vllm_defaults.set_cpu(
            os.environ,
            args.tensor_parallel_size,
            args.enforce_eager,
            machine.usable_cores(),
            args.kv_cache_memory_bytes,
        )
    try:
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        raise SettingsError(reason(error)) from None
    if not args.served_model_name:  # a path of this machine is nothing to tell clients
        args.served_model_name = [Path(args.model).resolve().name if Path(args.model).is_dir() else args.model]
    return args


@explained()
def resolve(args: Namespace, conversion: Conversion | None = None) -> None:
    """Find the files that these flags name, download and convert what has to be, and make `args` those of the result.

    May take minutes, and begins with what takes no time: a flag that does not fit the model is refused before it is
    converted. Raises `SettingsError`, `FormatError` and what vLLM raises.
    """
    name = Path(args.model).resolve().name
    vllm_defaults.resolve_hub_model(args, os.environ, conversion)
    vllm_defaults.check_tokenizer(args)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        args.dtype = _cpu_dtype(args)
    if conversion is not None and Path(args.model).is_dir():
        made = conversion.prepare(Path(args.model), name, lambda: _check_fits(args))
        args.model = args.model_tag = str(made.directory)
        if made.overrides is not None and not callable(args.hf_overrides):
            args.hf_overrides = {**made.overrides, **(args.hf_overrides or {})}
    elif conversion is not None and conversion.masks is not None:
        raise SettingsError(f"--masks {conversion.masks}: for a dense model of safetensors files, which {name} is not")
    vllm_defaults.expect_all_weights(args)


def _check_fits(args: Namespace) -> None:
    """Raise what vLLM says of these flags and a model that is not converted yet: how its weights are stored, it need
    not know for that."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from sparse_serve.plugin.served import unknown_architecture

    overrides = args.hf_overrides if isinstance(args.hf_overrides, dict) else {}
    plain = Namespace(**vars(args) | {"hf_overrides": {**overrides, CONFIG_KEY: None}})
    with unknown_architecture(args.model):
        AsyncEngineArgs.from_cli_args(plain).create_engine_config(UsageContext.OPENAI_API_SERVER)


def _cpu_dtype(args: Namespace) -> str:
    """On CPU, vLLM's "auto" silently turns a float32 checkpoint into bfloat16; here "auto" is the checkpoint's.

    Not so where vLLM's CPU backend has attention in bfloat16 only: with a latent cache (MLA), and linear (gated delta).
    """
    from vllm.transformers_utils.config import get_config

    if args.dtype != "auto":
        return str(args.dtype)
    config = get_config(args.model, args.trust_remote_code, revision=args.revision).get_text_config()
    if getattr(config, "kv_lora_rank", None) or getattr(config, "linear_num_key_heads", None):
        return "auto"
    dtype = str(config.dtype).removeprefix("torch.")
    return dtype if dtype in ("float32", "float16", "bfloat16") else "auto"
