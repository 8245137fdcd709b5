"""`sparse-serve serve MODEL`: an OpenAI API over HTTP and a gRPC API, on vLLM.

Prints when the engine starts, what to call once it is ready, what is slower than it should be, and how it ends. All
else goes to a log file (`terminal`), or is printed too with `--verbose`.
"""

import argparse
import asyncio
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from maskgen.core.errors import SparseError
from maskgen.core.failures import explained
from sparse_serve.cli import restart, terminal
from sparse_serve.cli import settings as settings_flags
from sparse_serve.cli.terminal import Terminal
from sparse_serve.engine import Engine, EngineInfo, KernelChoice
from sparse_serve.runtime import environment, processes, vllm_version
from sparse_serve.runtime.conversion import Conversion
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.runtime.startup_error import reason
from sparse_serve.server.handshake import event_loop
from sparse_serve.server.lifecycle import (
    CutOff,
    Draining,
    EngineDied,
    EngineHung,
    Event,
    Listening,
    Ready,
    Server,
    Stopped,
)
from sparse_serve.server.settings import Settings

if TYPE_CHECKING:
    from sparse_serve.engine.vllm_engine import VllmEngine

logger = logging.getLogger(__name__)

_EPILOG = """MODEL comes first. Every flag of `vllm serve` is accepted too and handed to vLLM:
--max-model-len 4096, --tensor-parallel-size 2, --dtype float32, ...
`sparse-serve vllm serve --help=all` lists them."""

_REFERENCE = "reference"
_NOISE = 1.05
"""What two measurements of the same thing may differ by."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve serve`, without vLLM's."""
    parser.usage, parser.epilog = "%(prog)s MODEL [flags]", _EPILOG
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory of a sparse or dense checkpoint, or a Hugging Face model name; comes before vLLM's flags",
    )
    parser.add_argument("--verbose", action="store_true", help="print the log of vLLM and the server, write no file")
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="FILE",
        help="masks of MaskLLM (.npz) for MODEL, the dense model they were learned on (default: none)",
    )
    parser.add_argument(
        "--no-convert",
        action="store_true",
        help="serve a sparse model of another tool as it is (default: a copy is made once, in the cache folder)",
    )
    settings_flags.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Serve until a signal comes; `args.others` are vLLM's flags. Returns 0, 1 if the engine died, 2 for bad input."""
    settings = settings_flags.settings_of(args)
    vllm_version.allow(settings.untested_vllm)
    vllm_version.check()
    logging.getLogger("sparse_serve.access").setLevel(logging.INFO if settings.access_log else logging.WARNING)
    if settings.log_json:
        from pythonjsonlogger.json import JsonFormatter

        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter("{levelname}{asctime}{name}{message}", style="{"))
    restart.prepare(settings)
    processes.follow()  # a benchmark that started this server, if one did
    shown = terminal.plain()
    engine = _engine(args, settings, lambda line: shown.note(line))
    stop = restart.StopRequest()
    try:
        if not args.verbose:
            shown = terminal.redirected()
        compiles = not {"--enforce-eager", "--enable-lora"} & {*args.others} and shutil.which("g++") is not None
        compiles &= os.environ.get("TORCHDYNAMO_DISABLE") != "1"
        reporter = Reporter(shown, args.model, access(settings), compiles)
        with explained(), environment.restored(), event_loop(bool(settings.tls_cert)) as runner:
            code = runner.run(_serve(engine, settings, reporter, stop))
    except (SparseError, OSError) as error:
        shown.note(f"sparse-serve: error: {error}{_log(shown)}")
        return 2
    except Exception as error:
        logger.exception("the server failed")
        shown.note(f"sparse-serve: error: {reason(error)}{_log(shown)}")
        return 1
    if engine.is_loading:
        # stopped in the middle of a download, say, whose threads Python would wait for
        logging.shutdown()
        os._exit(code)
    if code and not stop.is_made:
        restart.if_allowed(settings.restarts, shown)
    return code


def _engine(args: argparse.Namespace, settings: Settings, note: Callable[[str], None]) -> "VllmEngine":
    from sparse_serve.engine.vllm_engine import VllmEngine
    from sparse_serve.engine.vllm_weights import WeightChecks

    # flags of both: without this, vLLM would not hear of them
    shared = ("max_logprobs", "max_num_queued_reqs", "max_num_queued_tokens")
    flags = [*args.others, *(f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in shared)]
    if args.masks and args.no_convert:
        raise SettingsError(f"--masks {args.masks}: not with --no-convert, as masks are applied by converting")
    return VllmEngine(
        args.model,
        flags,
        drain_s=settings.drain_s,
        weight_checks=WeightChecks(settings.verify_digests, settings.allow_zero_weights),
        conversion=None if args.no_convert else Conversion(args.masks, note),
        preemption=settings.preemption,
        messages_per_s=settings.messages_per_s,
    )


def _log(shown: Terminal) -> str:
    """The end of an error's line, if there is a log that says more. The last line printed says what went wrong."""
    return f"; log: {shown.log}" if shown.log else ""


async def _serve(
    engine: Engine, settings: Settings, on_event: Callable[[Event], None], stop: restart.StopRequest
) -> int:
    from prometheus_client import REGISTRY

    from sparse_serve.api import grpc_v1, http_openai, landing, ops

    server = Server(engine, settings, [ops, landing, http_openai, grpc_v1], REGISTRY, on_event)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    try:
        code = await server.run()
        stop.is_made = server.is_stopping
        return code
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            # all is closed; another signal must not turn the exit code into a failure
            signal.signal(number, stop)


@dataclass(frozen=True)
class Access:
    """What a client has to do to come in: words for the printed commands, and a line about them."""

    scheme: str = "http"
    curl: tuple[str, ...] = ()
    generate: tuple[str, ...] = ()
    remark: str = ""


OPEN = Access()


def access(settings: Settings) -> Access:
    """By what the server asks of its clients."""
    curl, generate, lacks = [], [], []
    if settings.tls_cert:
        curl += ["--cacert", "CA.pem"]
        generate += ["--tls-ca", "CA.pem"]
        lacks.append("CA.pem: of the authority that signed the certificate")
    if settings.tls_client_ca:
        curl += ["--cert", "CLIENT.pem", "--key", "CLIENT.key"]
        generate += ["--tls-cert", "CLIENT.pem", "--tls-key", "CLIENT.key"]
        lacks.append("CLIENT.pem, CLIENT.key: a certificate of --tls-client-ca")
    if settings.api_keys:
        curl += ["-H", "authorization: Bearer KEY"]
        generate += ["--api-key-file", "FILE"]
        lacks.append(f"KEY, FILE: one of {settings.api_keys}")
    remark = f"  with  {'; '.join(lacks)}\n" if lacks else ""
    return Access("https" if settings.tls_cert else "http", tuple(curl), tuple(generate), remark)


class Reporter:
    """Words for the server's events. Called in the order they happen."""

    def __init__(self, shown: Terminal, model: str, access: Access = OPEN, compiles: bool = False) -> None:
        self._shown, self._model, self._access, self._compiles = shown, model, access, compiles
        self._started_s = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Print one event."""
        match event:
            case Listening():
                where = f"; log: {self._shown.log} (--verbose prints it)" if self._shown.log else ""
                first = " (a first start compiles it, a minute or more; --enforce-eager does not)"
                self._shown.note(f"starting the engine on {self._model}{first * self._compiles}{where}")
            case Ready(info, http, grpc):
                parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in info.startup_s.items())
                took = f"{time.monotonic() - self._started_s:.1f} s"
                self._shown.note(f"started in {took} ({parts})" if parts else f"started in {took}")
                self._shown.say(ready_block(info, http, grpc, self._access))
                for warning in warnings(info):
                    self._shown.note(f"warning: {warning}")
            case Draining(requests, limit_s):
                running = f"{requests} running request{'s' * (requests != 1)} (up to {limit_s:g} s)"
                self._shown.note(f"stopping: waiting for {running}" if requests else "stopping")
            case CutOff(requests, limit_s):
                self._shown.note(f"{requests} request{'s' * (requests != 1)} did not finish in {limit_s:g} s: cut off")
            case EngineDied():
                self._shown.note(f"sparse-serve: error: the engine has died{_log(self._shown)}")
            case EngineHung(limit_s):
                found = f"the engine has made no step for {limit_s:g} s (--watchdog-s)"
                self._shown.note(f"sparse-serve: error: {found}{_log(self._shown)}")
            case Stopped():
                self._shown.note("stopped")


def ready_block(info: EngineInfo, http: str, grpc: str, access: Access = OPEN) -> str:
    """What a person wants to read and paste once the server is up."""
    path, body = example(info)
    share = f"{info.sparse_layers} sparse layers" if info.sparse_layers else "a dense model"
    url = f"{access.scheme}://{http}"
    curl = ["curl", *access.curl]
    call = [*curl, f"{url}{path}", "-H", "content-type: application/json", "-d", json.dumps(body)]
    generate = [*_this_command(), "generate", "--address", grpc, *access.generate, "--max-tokens", "16", "Hello"]
    to_try = "" if info.embeds else f"        {shlex.join(generate)}\n"
    return f"""
ready: {info.model} ({share}, {info.dtype}, up to {info.max_model_len} tokens)
{quality_line(info)}
  HTTP  {url}  (in a browser: a page to talk to it)
        {shlex.join(call)}
  gRPC  {grpc}
{to_try}  see   {shlex.join([*curl, f"{url}/metrics"])}
{access.remark}"""


def quality_line(info: EngineInfo) -> str:
    """What was measured of the model when it was pruned, with an end of line; nothing where that is not known."""
    if info.quality is None:
        return ""
    bad = "; that is bad, and `maskgen inspect` says what to try" if info.quality.is_bad else ""
    return f"quality: {info.quality.describe()}{bad}\n"


def example(info: EngineInfo) -> tuple[str, dict[str, object]]:
    """Path and body of an HTTP request to try: a chat where the model has a chat template, else text to continue, or a
    text to embed."""
    if info.embeds:
        return "/v1/embeddings", {"model": info.model, "input": "Hello"}
    if not info.chat:
        return "/v1/completions", {"model": info.model, "prompt": "Hello", "max_tokens": 16}
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    return "/v1/chat/completions", {"model": info.model, "messages": messages, "max_tokens": 32}


def warnings(info: EngineInfo) -> list[str]:
    """What may not be as it was meant, a line each: files that were changed, and what is slower than a dense model
    would be, layers on the last-resort kernel, and as measured."""
    changed = [f"{change}; --verify-digests refuses that" for change in info.changes]
    lines = []
    if unaided := info.kernels.get(_REFERENCE, 0):
        lines.append(f"{unaided} of {info.sparse_layers} sparse layers run on the slow kernel `{_REFERENCE}`")
    slower = [choice for choice in info.choices if choice.speedup * _NOISE < 1]
    if slower:
        worst = min(slower, key=lambda choice: choice.speedup)
        lines.append(
            f"slower than dense for {_tokens(slower)} tokens in a step, at worst {worst.speedup:.2f}x (a layer of "
            f"{worst.out_features}x{worst.in_features}, {worst.tokens} tokens)"
        )
    return changed + [f"{line}; `sparse-serve doctor` says more" for line in lines]


def _tokens(choices: Sequence[KernelChoice]) -> str:
    return ", ".join(map(str, sorted({choice.tokens for choice in choices})))


def _this_command() -> list[str]:
    """`sparse-serve` for another terminal, whose PATH need not be ours."""
    script = Path(sys.executable).with_name("sparse-serve")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "sparse_serve.cli.main"]
