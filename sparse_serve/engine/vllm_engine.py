"""The engine: vLLM's `AsyncLLM`, wrapped so that the rest of the server never sees vLLM.

Starting takes tens of seconds and blocks, so it runs in a thread of its own while the event loop goes on answering
"not ready". `stop` may come in the middle: the processes started so far are killed, which also makes the thread end,
unless it is stuck in a download; it is left behind then. vLLM is imported in that thread too, which is why no import of
it stands at the top of this file.

`AsyncLLM` always runs the engine in a child process. What a machine without a GPU needs is in `vllm_defaults`;
everything the user says with a vLLM flag or variable wins.

Perplexity: `score` asks for `prompt_logprobs=0`, the log-probability of each actual prompt token. vLLM computes it as
a float32 log-softmax over the whole vocabulary, so it is exact.

A sparse checkpoint, local or from the hub, is verified before the engine starts, and once it runs, the layers the
workers really hold on sparse kernels are compared with its manifest: vLLM merely logs a plugin that fails to load.
"""

import asyncio
import contextlib
import logging
import math
import os
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import psutil

from maskgen.core.checkpoint import SparseCheckpoint, is_sparse_checkpoint
from maskgen.core.config import QUANT_METHOD
from maskgen.core.errors import SparseError
from sparse_serve.engine import Chunk, EngineInfo, GenerateRequest, vllm_defaults
from sparse_serve.engine.vllm_values import engine_info, sampling_arguments, takes_chat, to_chunk
from sparse_serve.runtime import machine, processes
from sparse_serve.runtime.errors import (
    BadRequestError,
    EngineDiedError,
    EngineStartError,
    OverloadedError,
    SettingsError,
)
from sparse_serve.runtime.startup_error import collect_startup_error

logger = logging.getLogger(__name__)

WORKER_EXTENSION = "sparse_serve.plugin.worker.WorkerExtension"
_KILL_AFTER_S = 10.0


class VllmEngine:
    """Implements `Engine`. `model` is a directory or a Hugging Face name, `flags` are any of `vllm serve`.

    `drain_s`: how long the engine process itself finishes running requests when a signal reaches it directly, as a
    Ctrl-C in a terminal does.
    """

    def __init__(self, model: str, flags: Sequence[str] = (), drain_s: float = 0.0) -> None:
        self.args: Namespace | None = None
        self.client: Any = None
        vllm_defaults.check_model(model)
        self._command = [model, *flags]
        self._drain_s = drain_s
        self._thread: threading.Thread | None = None
        self._stopped = False
        self._others = processes.descendants(os.getpid())

    async def start(self) -> EngineInfo:
        """Load the model. See `Engine.start`."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[None] = loop.create_future()

        def load() -> None:
            error: BaseException | None = None
            try:
                self._load()
            except BaseException as failure:
                error = failure
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody is waiting
                loop.call_soon_threadsafe(_settle, loaded, error)

        with collect_startup_error() as startup_error:
            self._thread = threading.Thread(target=load, name="engine-start", daemon=True)
            self._thread.start()
            try:
                await loaded
                await self.client.reset_mm_cache()
                return await self._describe()
            except BaseException as error:
                await self.stop(0.0)
                if isinstance(error, SparseError) or not isinstance(error, Exception):
                    raise
                logger.exception("vLLM did not start")
                why = startup_error() or f"{_last_line(error)}; the log says more"
                raise EngineStartError(f"the engine did not start: {why}") from None

    def _load(self) -> None:
        """Everything slow and blocking, in order; runs in the start thread."""
        processes.lead()
        vllm_defaults.set_common(os.environ)
        self.args = parse(self._command, self._drain_s)
        self._check_wanted()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from sparse_serve.plugin.config import verify
        from sparse_serve.plugin.served import unknown_architecture

        if is_sparse_checkpoint(self.args.model):
            verify(self.args.model)
        engine_args = AsyncEngineArgs.from_cli_args(self.args)
        with unknown_architecture(self.args.model):
            config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        if config.model_config.quantization == QUANT_METHOD and not is_sparse_checkpoint(self.args.model):
            raise SettingsError(f"{self.args.model} is sparse, but no directory to verify; download it, give its path")
        # vLLM runs no hook in its engine process until that has talked to the server, but it unpickles this first
        config.follow = processes.Follow()
        self._check_wanted()
        self.client = AsyncLLM.from_vllm_config(
            vllm_config=config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=engine_args.enable_log_requests,
            disable_log_stats=engine_args.disable_log_stats,
        )

    def _check_wanted(self) -> None:
        if self._stopped:
            raise EngineStartError("stopped while starting")

    async def _describe(self) -> EngineInfo:
        assert self.args is not None
        model = self.client.model_config
        ranks = await self.client.collective_rpc("sparse_stats")
        if is_sparse_checkpoint(self.args.model):
            served = [name for rank in ranks for name in rank["sparse_names"]]
            _check_manifest(SparseCheckpoint.open(self.args.model, verify_bits=False), served)
        name = (self.args.served_model_name or [self.args.model])[0]
        info = engine_info(name, model, ranks, self.client.vllm_config.parallel_config.tensor_parallel_size)
        for kernel, layers in sorted(info.kernels.items()):
            logger.info("%d sparse layers on kernel %s", layers, kernel)
        return replace(info, chat=takes_chat(self.args.chat_template, self.client.renderer.tokenizer))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate. See `Engine.generate`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = request.prompt
        source = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
        model = self.client.model_config
        arguments = sampling_arguments(request.sampling, model.get_diff_sampling_param(), model.max_model_len)
        completion_tokens = 0
        with _translated():
            params = SamplingParams(**arguments, output_kind=RequestOutputKind.DELTA)
            outputs = self.client.generate(source, params, f"grpc-{uuid.uuid4().hex}")
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    completion_tokens += len(output.outputs[0].token_ids)
                    yield to_chunk(output, completion_tokens, request.sampling)

    async def score(self, token_ids: list[int]) -> list[float]:
        """Log-probabilities. See `Engine.score`."""
        from vllm import SamplingParams

        longest = self.client.model_config.max_model_len - 1
        if not 2 <= len(token_ids) <= longest:
            raise BadRequestError(f"{len(token_ids)} tokens to score; expected 2 to {longest} (max_model_len - 1)")
        with _translated():
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
            prompt = {"prompt_token_ids": token_ids}
            async for output in self.client.generate(prompt, params, f"score-{uuid.uuid4().hex}"):
                final = output
        return [final.prompt_logprobs[i][token_ids[i]].logprob for i in range(1, len(token_ids))]

    @property
    def is_loading(self) -> bool:
        """Whether the start thread is still busy. After `stop`, that is one which cannot be interrupted."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def died(self) -> bool:
        return self.client is not None and not self._stopped and self.client.errored

    async def stop(self, grace_s: float) -> None:
        """Give everything back. See `Engine.stop`."""
        if self._stopped:
            return
        self._stopped = True
        client, self.client = self.client, None
        if client is not None:
            await asyncio.to_thread(client.shutdown, timeout=grace_s)
        deadline_s = time.monotonic() + _KILL_AFTER_S
        while self.is_loading and time.monotonic() < deadline_s:
            processes.kill(self._started())
            await asyncio.sleep(0.05)
        processes.kill(self._started())

    def _started(self) -> set[psutil.Process]:
        return processes.descendants(os.getpid()) - self._others


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
            raise SettingsError(f"{message}; `python -m sparse_serve.cli.vllm serve --help=all` lists vLLM's flags")

    parser = make_arg_parser(Parser(prog="sparse-serve serve"))
    defaults = parser.parse_args([])
    on_cpu = current_platform.is_cpu()
    parser.set_defaults(shutdown_timeout=math.ceil(drain_s))
    if on_cpu:
        parser.set_defaults(enforce_eager=True)
    args = parser.parse_args(list(command))
    vllm_defaults.check_flags(args, defaults, os.environ)
    args.model = args.model_tag or args.model
    args.worker_extension_cls = WORKER_EXTENSION
    if on_cpu:
        vllm_defaults.check_cpu(args)
        vllm_defaults.set_cpu(os.environ, args.tensor_parallel_size, args.enforce_eager, machine.usable_cores())
    try:
        validate_parsed_serve_args(args)
    except (ValueError, TypeError) as error:
        raise SettingsError(str(error)) from None
    vllm_defaults.resolve_hub_model(args, os.environ)
    if on_cpu:
        args.dtype = _cpu_dtype(args)
    return args


def _cpu_dtype(args: Namespace) -> str:
    """On CPU, vLLM's "auto" silently turns a float32 checkpoint into bfloat16; here "auto" is the checkpoint's."""
    from vllm.transformers_utils.config import get_config

    if args.dtype != "auto":
        return str(args.dtype)
    config = get_config(args.model, args.trust_remote_code, revision=args.revision)
    dtype = str(config.get_text_config().dtype).removeprefix("torch.")
    return dtype if dtype in ("float32", "float16", "bfloat16") else "auto"


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """vLLM's exceptions as ours. What is not listed is unexpected, and stays as it is."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except VLLMClientError as error:
        raise BadRequestError(str(error)) from error
    except GracefulHTTPError as error:
        raise OverloadedError(str(error)) from error
    except EngineDeadError as error:
        raise EngineDiedError("the engine has died; this server is going down") from error


def _check_manifest(checkpoint: SparseCheckpoint, served: Sequence[str]) -> None:
    """Raise `EngineStartError` unless every target of the manifest is among those `served` sparse."""
    missing = sorted(set(checkpoint.config.targets) - set(served))
    if missing:
        raise EngineStartError(
            f"{len(missing)} of {len(checkpoint.config.targets)} layers of {checkpoint.path} are not served sparse: "
            f"{', '.join(missing[:5])}; is the plugin installed, and does VLLM_PLUGINS leave it in?"
        )


def _settle(future: "asyncio.Future[None]", error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
