"""Which of vLLM's flags this server cannot honour, and what vLLM needs to be told that the user did not say.

No vLLM import here. Most defaults are for machines without a GPU; each answers a way in which vLLM 0.32 fails there or
is needlessly slow:

- it wants 92 % of the memory for its KV cache unless `VLLM_CPU_KVCACHE_SPACE` names an amount (whole GiB);
- `--enforce-eager`: its compile cache is written but never read back, so every start would compile for 10 to 20 s;
  with eager execution, dynamo only costs (20 s in the first request that asks for log-probabilities);
- with one rank, `VLLM_ENABLE_V1_MULTIPROCESSING=0` keeps the model in the engine process. A separate worker process
  would die at once from a Ctrl-C meant for the whole group, before its requests are finished, and would run on all
  cores but one;
- with several ranks, its automatic binding of threads needs one NUMA node per rank: share the cores out instead.
"""

from argparse import Namespace
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from sparse_serve.errors import SettingsError

_GIB = 1 << 30
_MAX_KV_CACHE_GIB = 4
_MAX_SEQUENCES = 128
_REFUSED = {
    "port": "use --http-port",
    "uds": "this server listens on TCP",
    "headless": "this server is the front end",
    "grpc": "the gRPC door is always open, see --grpc-port",
    "grpc_port": "the gRPC door is ours",
    "api_key": "it would guard only a part of the HTTP door and nothing of gRPC; put a proxy in front",
    "ssl_keyfile": "it would encrypt the HTTP door only; put a proxy in front",
    "ssl_certfile": "it would encrypt the HTTP door only; put a proxy in front",
    "worker_extension_cls": "the server needs its own to count sparse layers",
}
"""Flags of `vllm serve` that would be ignored here, or be half true, and what to do instead."""


def check_model(model: str) -> None:
    """Raise `SettingsError` for a path that is no model directory, before vLLM looks for it on the network."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SettingsError(f"{model} has no config.json; expected a Hugging Face model directory")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise SettingsError(f"{model} is not a directory; expected one, or a Hugging Face name such as owner/model")


def check_flags(args: Namespace, defaults: Namespace, environ: Mapping[str, str]) -> None:
    """Raise `SettingsError` for the first flag that would be ignored here, or be half true."""
    for name, instead in _REFUSED.items():
        if getattr(args, name) != getattr(defaults, name):
            raise SettingsError(f"vLLM's --{name.replace('_', '-')} cannot be used here: {instead}")
    if environ.get("VLLM_API_KEY"):
        raise SettingsError(f"VLLM_API_KEY cannot be used here: {_REFUSED['api_key']}")


def set_common(environ: MutableMapping[str, str]) -> None:
    """Defaults for every machine, to be set before vLLM is imported."""
    environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    environ.setdefault("VLLM_MAX_N_SEQUENCES", str(_MAX_SEQUENCES))


def set_cpu(environ: MutableMapping[str, str], ranks: int, eager: bool, cores: Sequence[int]) -> None:
    """Defaults for the CPU backend. `ranks`: tensor- times pipeline-parallel size; `cores`: ids we may run on."""
    environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_kv_cache_gib(_available_bytes())))
    if eager:
        environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if ranks == 1:
        environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    elif len(cores) >= ranks:
        environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", share_out(cores, ranks))


def share_out(cores: Sequence[int], ranks: int) -> str:
    """Split cores into one contiguous list per rank, in vLLM's notation: `0,1|2,3`."""
    share = len(cores) // ranks
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))


def _kv_cache_gib(available_bytes: int) -> int:
    """A quarter of what is available: the weights and everybody else need the rest."""
    return max(1, min(_MAX_KV_CACHE_GIB, available_bytes // 4 // _GIB))


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024
    return 0
