"""Which of vLLM's flags this server refuses, and the defaults it gives vLLM where the user says nothing.

A sparse model of the hub is also downloaded here, as only what is in a directory can be verified before it is served.

No vLLM import here; `Namespace` is what vLLM's parser returns.

Most defaults are for machines without a GPU; each answers a way in which vLLM 0.32 fails there or is needlessly slow:

- it wants 92 % of the memory for its KV cache unless `VLLM_CPU_KVCACHE_SPACE` (whole GiB) or the flag
  `--kv-cache-memory-bytes` names an amount;
- `--enforce-eager` where nothing can be compiled, as the engine would die of it; dynamo then only costs (20 s in the
  first request that asks for log-probabilities). Where a model can be compiled it is: `plugin.compiled_code` makes vLLM
  find the code again at the next start;
- with one rank, `VLLM_ENABLE_V1_MULTIPROCESSING=0` keeps the model in the engine process. A separate worker process
  would die at once from a Ctrl-C meant for the whole group, before its requests are finished, and would run on all
  cores but one;
- with several ranks, its automatic binding of threads needs one NUMA node per rank: share the cores out instead.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskgen.core.checkpoint import INDEX_NAME, SINGLE_NAME, check_directory, is_sparse_checkpoint
from maskgen.core.companions import SETTINGS_PATTERNS, SNAPSHOT_PATTERNS
from maskgen.core.compiler import has_cpp_compiler
from maskgen.core.config import QUANT_METHOD, is_shard_name
from maskgen.core.failures import machine_failure
from maskgen.core.files import read_json
from maskgen.core.foreign import may_be_foreign
from sparse_serve.runtime import machine
from sparse_serve.runtime.conversion import Conversion
from sparse_serve.runtime.errors import SettingsError

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_MAX_KV_CACHE_GIB = 4
_MAX_SEQUENCES = 128
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json", "tokenization_*.py")
"""Files one of which a tokenizer has, as far as vLLM and transformers know."""

SAFETENSORS = ("auto", "hf", "safetensors")
"""Values of `--load-format` under which weights are read from safetensors files, where there are any."""

_REFUSED = {
    "port": "use --http-port",
    "uds": "this server listens on TCP; use --host and --http-port",
    "headless": "this server always has its HTTP and gRPC APIs",
    "grpc": "the gRPC API is always open, see --grpc-port",
    "grpc_port": "this server has a gRPC API of its own, see --grpc-port",
    "api_key": "it would guard only a part of the HTTP API and nothing of gRPC; use --api-keys FILE",
    **dict.fromkeys(
        ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "enable_ssl_refresh"),
        "it would encrypt the HTTP API only; use --tls-cert, --tls-key and --tls-client-ca",
    ),
    "config": "write it in two words, --config FILE: with = in between vLLM does not read the file",
    "worker_extension_cls": "the server uses it to count the sparse layers of each worker",
    "root_path": "the HTTP API's own routes would not follow; let the proxy strip the prefix",
    "api_server_count": "one process holds both APIs; run more replicas instead",
    **dict.fromkeys(
        ("uvicorn_log_level", "disable_uvicorn_access_log", "disable_access_log_for_endpoints"),
        "the log of requests is another; use --access-log",
    ),
    **dict.fromkeys(
        ("h11_max_incomplete_event_size", "h11_max_header_count"),
        "the HTTP API has its own limits, see --max-header-bytes",
    ),
    **dict.fromkeys(("tool_parser_plugin", "reasoning_parser_plugin"), "only vLLM's built-in parsers are loaded"),
    **dict.fromkeys(
        (
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_size_local",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_backend",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
            "data_parallel_multi_port_external_lb",
            "data_parallel_supervisor_port",
            "dp_supervisor_probe_interval_s",
            "dp_supervisor_probe_timeout_s",
            "dp_supervisor_probe_failure_threshold",
        ),
        "one server, one machine: --data-parallel-size runs replicas on it; put more servers behind a load balancer",
    ),
}
"""Flags of `vllm serve` that would have no effect here, or only on a part of the server, and what to do instead."""


def check_model(model: str) -> None:
    """Raise `SettingsError` for a path that is no model directory, before vLLM looks for it on the network.

    `FormatError` for an adapter in place of a model.
    """
    path = Path(model)
    if path.is_dir():
        check_directory(path)
        if not (path / "config.json").is_file():
            raise SettingsError(f"{model} has no config.json; expected a Hugging Face model directory")
    elif path.is_file():
        advice = "; `maskgen run` makes a sparse one of a GGUF file" if path.suffix.lower() == ".gguf" else ""
        raise SettingsError(f"{model} is a file, expected a Hugging Face model directory{advice}")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise SettingsError(
            f"{model} is not a directory; expected one, or a Hugging Face name such as owner/model, before vLLM's flags"
        )


def check_tokenizer(args: Namespace) -> None:
    """Raise `SettingsError` for a directory that has no tokenizer in it, where vLLM's own words name none of this."""
    directory = Path(args.tokenizer or args.model)
    if args.skip_tokenizer_init:
        return
    if directory.is_dir():
        if not any(found for pattern in _TOKENIZERS for found in directory.glob(pattern)):
            raise SettingsError(
                f"{directory} has no tokenizer (tokenizer.json, tokenizer.model, ...); copy it from the base model, or "
                "name a directory that has one with --tokenizer"
            )
    elif str(args.tokenizer).startswith((".", "/", "~")):
        raise SettingsError(f"--tokenizer is {args.tokenizer}; expected a directory or a Hugging Face name")


def resolve_hub_model(args: Namespace, environ: Mapping[str, str], conversion: Conversion | None = None) -> None:
    """Point a hub model that is sparse at its local snapshot, downloading what is missing, under the name it was given.

    So is one that `conversion` is for, which its weights may have to tell. A dense one is left to vLLM, which knows
    more file formats, and so is another hub. Raises `SettingsError` when the hub does not answer.
    """
    if Path(args.model).is_dir() or environ.get("VLLM_USE_MODELSCOPE", "").lower() == "true":
        return
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RemoteEntryNotFoundError

    place = {"revision": args.revision, "cache_dir": args.download_dir}
    code = ["*.py"] if args.trust_remote_code else []
    with _hub_errors(args.model):
        try:
            config = Path(hf_hub_download(args.model, "config.json", **place))
        except (RemoteEntryNotFoundError, HFValidationError):
            return
        if is_sparse_checkpoint(config.parent):
            directory = snapshot_download(args.model, allow_patterns=[*SNAPSHOT_PATTERNS, *code], **place)
        elif conversion is not None and args.load_format in SAFETENSORS and may_be_foreign(read_json(config)):
            patterns = [*SETTINGS_PATTERNS, *_shards(args.model, place), *code]
            try:
                directory = snapshot_download(args.model, allow_patterns=patterns, **place)
            except LocalEntryNotFoundError:  # offline, and somebody else has left out what vLLM may do without
                return
            if not conversion.is_for(Path(directory)):
                return
        else:
            return
    args.served_model_name = args.served_model_name or [args.model]
    args.model = args.model_tag = directory


def _shards(model: str, place: Mapping[str, Any]) -> list[str]:
    """The files of weights that a hub model has to have to be converted."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        index = Path(hf_hub_download(model, INDEX_NAME, **place))
    except EntryNotFoundError:
        return [SINGLE_NAME]
    weight_map = read_json(index).get("weight_map")
    return sorted(filter(is_shard_name, map(str, weight_map.values()))) if isinstance(weight_map, dict) else []


@contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if (failure := machine_failure(error)) is not None:
            raise failure from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SettingsError(
            f"{model} is neither a directory nor to be had from the Hugging Face hub: {reason}"
        ) from error


def check_flags(args: Namespace, defaults: Namespace, environ: Mapping[str, str]) -> None:
    """Raise `SettingsError` for the first flag that would have no effect here, or only on a part of the server."""
    for name, instead in _REFUSED.items():
        if getattr(args, name) != getattr(defaults, name):
            raise SettingsError(f"vLLM's --{name.replace('_', '-')} cannot be used here: {instead}")
    if environ.get("VLLM_API_KEY"):
        raise SettingsError(f"VLLM_API_KEY cannot be used here: {_REFUSED['api_key']}")


def check_tracing(args: Namespace) -> None:
    """Raise `SettingsError` where vLLM would take a request and die of its span."""
    if args.otlp_traces_endpoint and args.disable_log_stats:
        raise SettingsError(
            "--otlp-traces-endpoint and --disable-log-stats cannot be used together: vLLM makes spans of these "
            "statistics, and the first answer would end the engine"
        )


def no_compiling(args: Namespace, environ: Mapping[str, str]) -> str | None:
    """Why vLLM would not or could not compile this model for a processor here; None if it can."""
    folder = Path(environ.get("VLLM_CACHE_ROOT") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "vllm")
    if environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE is 1"
    if args.enable_lora:
        return "vLLM compiles no model with adapters on a CPU"
    if not machine.is_writable(folder.expanduser()):
        return f"{folder}, where the code is kept (VLLM_CACHE_ROOT), cannot be written"
    if not has_cpp_compiler():
        return "there is no C++ compiler, or no headers of Python's (g++ and python3-dev on Debian)"
    return None


def check_cpu(args: Namespace, obstacle: str | None) -> None:
    """Raise `SettingsError` for what vLLM's CPU backend accepts and cannot do here; `obstacle`: to compile."""
    if not args.enforce_eager and obstacle is not None:
        raise SettingsError(f"--no-enforce-eager: nothing can be compiled here: {obstacle}; leave the flag out")
    if args.pipeline_parallel_size > 1:
        raise SettingsError(
            f"--pipeline-parallel-size {args.pipeline_parallel_size}: vLLM's CPU backend would die in the first "
            "request, with any model; use --tensor-parallel-size"
        )


def expect_all_weights(args: Namespace) -> None:
    """A start without some tensor of a sparse checkpoint fails, and so does one with a tensor too many.

    Of quantised models vLLM misses none unless asked to, and our own loader (`plugin.loading`) finds those left over.

    Other loaders than that of safetensors files do not know this setting.
    """
    if args.load_format in SAFETENSORS and is_sparse_checkpoint(args.model):
        args.load_format = QUANT_METHOD
        args.model_loader_extra_config = {"enable_weights_track": True, **args.model_loader_extra_config}


def set_common(environ: MutableMapping[str, str]) -> None:
    """Defaults for every machine, to be set before vLLM is imported."""
    environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    environ.setdefault("VLLM_MAX_N_SEQUENCES", str(_MAX_SEQUENCES))


def set_cpu(
    environ: MutableMapping[str, str], ranks: int, eager: bool, cores: Sequence[int], kv_cache_bytes: int | None = None
) -> None:
    """Defaults for the CPU backend. `ranks`: tensor-parallel size; `cores`: ids we may run on; `kv_cache_bytes`: what
    vLLM's flag says, which the variable would overrule."""
    if kv_cache_bytes is None:
        environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_kv_cache_gib(machine.available_bytes())))
    if eager:
        environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if ranks == 1:
        environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    elif len(cores) >= ranks:
        environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", share_out(cores, ranks))


def keep_variables(keep: bool) -> None:
    """Whether vLLM keeps the values of its environment variables, of which it reads some for every step and request.

    They are the process's: of two engines at a time the second would get what the first one read.
    """
    if (envs := sys.modules.get("vllm.envs")) is not None:
        (envs.enable_envs_cache if keep else envs.disable_envs_cache)()


def share_out(cores: Sequence[int], ranks: int) -> str:
    """Split cores into one contiguous list per rank, in vLLM's notation: `0,1|2,3`."""
    share = len(cores) // ranks
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))


def _kv_cache_gib(available_bytes: int) -> int:
    """A quarter of what is available: the weights and everybody else need the rest."""
    return max(1, min(_MAX_KV_CACHE_GIB, available_bytes // 4 // _GIB))
