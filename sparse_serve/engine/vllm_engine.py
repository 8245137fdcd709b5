"""The engine: vLLM's `AsyncLLM`, wrapped so that the rest of the server never sees vLLM.

Starting takes tens of seconds and blocks, so it runs in a thread of its own while the event loop goes on answering
"not ready". `stop` may come in the middle: the processes started so far are killed, which also makes the thread end,
unless it is stuck in a download; it is left behind then. vLLM is imported in that thread too, so not at the top here.

`AsyncLLM` always runs the engine in a child process. What a machine without a GPU needs is in `vllm_defaults`;
everything the user says with a vLLM flag or variable wins.

A sparse checkpoint, local or from the hub, is verified before the engine starts, and once it runs, the layers the
workers really hold on sparse kernels are compared with its manifest: vLLM merely logs a plugin that fails to load.
"""

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from maskgen.core.checkpoint import SparseCheckpoint, is_sparse_checkpoint
from maskgen.core.config import QUANT_METHOD
from maskgen.core.errors import SparseError
from maskgen.core.quality import known_quality
from sparse_serve.engine import (
    NOBODY,
    Chunk,
    EngineInfo,
    GenerateRequest,
    Origin,
    Progress,
    vllm_adapters,
    vllm_defaults,
    vllm_requests,
    vllm_turns,
)
from sparse_serve.engine.pace import Pace
from sparse_serve.engine.vllm_flags import parse, resolve
from sparse_serve.engine.vllm_progress import StepLogger
from sparse_serve.engine.vllm_values import engine_info, takes_chat, with_manifest
from sparse_serve.engine.vllm_weights import USUAL, WeightChecks
from sparse_serve.runtime import processes
from sparse_serve.runtime.conversion import Conversion
from sparse_serve.runtime.errors import EngineDiedError, EngineStartError, SettingsError, UnknownModelError
from sparse_serve.runtime.phases import Phases
from sparse_serve.runtime.startup_error import collect_startup_error, reason, record_failed_processes

logger = logging.getLogger(__name__)

_KILL_AFTER_S = 10.0


class VllmEngine:
    """Implements `Engine`. `model` is a directory or a Hugging Face name, `flags` are any of `vllm serve`.

    `drain_s`: how long the engine process itself finishes running requests when a signal reaches it directly, as a
    Ctrl-C in a terminal does. `conversion` makes sparse models of other tools ours; without, they are served as they
    are. With `preemption`, running requests take turns, too. `messages_per_s`: see `pace`. `adapters`, by name, and
    `chat_serving` are vLLM's own.
    """

    def __init__(
        self,
        model: str,
        flags: Sequence[str] = (),
        drain_s: float = 0.0,
        weight_checks: WeightChecks = USUAL,
        conversion: Conversion | None = None,
        preemption: bool = True,
        messages_per_s: int = 0,
    ) -> None:
        self.args: Namespace | None = None
        self.client: Any = None
        self.adapters: Mapping[str, Any] = {}
        self.chat_serving: Any = None
        vllm_defaults.check_model(model)
        self._command = [model, *flags]
        self._drain_s, self._weight_checks = drain_s, weight_checks
        self._conversion, self._preemption = conversion, preemption
        self._messages_per_s = messages_per_s
        self._sampling_defaults: Mapping[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._stopped = False
        self.progress, self._phases = Progress(), Phases()
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
                info = await self._describe()
                await self._warm_up()
                self._phases.end("first token")
                vllm_defaults.keep_variables(not self._stopped)
                return replace(info, startup_s=self._phases.seconds)
            except BaseException as error:
                await self.stop(0.0)
                dead = isinstance(error, EngineDiedError)  # which says not why
                if (isinstance(error, SparseError) and not dead) or not isinstance(error, Exception):
                    raise
                logger.exception("vLLM did not start")
                raise EngineStartError(f"the engine did not start: {startup_error() or reason(error)}") from None

    def _load(self) -> None:
        """Everything slow and blocking, in order; runs in the start thread."""
        processes.lead()
        record_failed_processes()
        vllm_defaults.set_common(os.environ)
        self.args = parse(self._command, self._drain_s)
        self._check_wanted()
        self._phases.end("imports")
        resolve(self.args, self._conversion)
        self._check_wanted()
        self._phases.end("model files")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        from sparse_serve.engine import vllm_detokenizer, vllm_pace
        from sparse_serve.plugin.served import unknown_architecture

        vllm_detokenizer.install()
        if self._messages_per_s:
            vllm_pace.install(Pace(self._messages_per_s))
        self._weight_checks.check_files(self.args.model, self.args.load_format)
        self._phases.end("verification")
        engine_args = AsyncEngineArgs.from_cli_args(self.args)
        with unknown_architecture(self.args.model):
            config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        if config.model_config.quantization == QUANT_METHOD and not is_sparse_checkpoint(self.args.model):
            raise SettingsError(f"{self.args.model} is sparse, but no directory to verify; download it, give its path")
        vllm_adapters.check(self.args, config)
        # vLLM runs no hook in its engine process until that has talked to the server, but it unpickles this first
        config.follow = processes.Follow()
        self._check_wanted()
        self._phases.end("configuration")
        self.client = AsyncLLM.from_vllm_config(
            vllm_config=vllm_turns.with_scheduler(config, self.args, self._preemption),
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=engine_args.enable_log_requests,
            disable_log_stats=engine_args.disable_log_stats,
            stat_loggers=[functools.partial(StepLogger, self.progress)],
        )
        vllm_turns.install(self.client, self.args)

    def _check_wanted(self) -> None:
        if self._stopped:
            raise EngineStartError("stopped while starting")

    async def _describe(self) -> EngineInfo:
        assert self.args is not None
        model, tasks = self.client.model_config, await self.client.get_supported_tasks()
        if not {"generate", "embed"} & {*tasks}:
            raise SettingsError(
                f"{self.args.model} would do {', '.join(tasks)}; this server serves models that generate text or make "
                "embeddings (--runner pooling --convert embed)"
            )
        ranks = await self.client.collective_rpc("sparse_stats")
        self._weight_checks.check_loaded(self.args.model, ranks)
        if "generate" in tasks:
            self._sampling_defaults = model.get_diff_sampling_param()  # reads a file
        for phase in ("workers", "weights"):
            if ends_s := [rank["ends_s"][phase] for rank in ranks if rank["ends_s"]]:
                self._phases.end(phase, max(ends_s))
        self._phases.end("cache and warm-up")
        info = engine_info(self.models[0], model, ranks, self.client.vllm_config.parallel_config.tensor_parallel_size)
        if is_sparse_checkpoint(self.args.model):
            served = [name for rank in ranks for name in rank["sparse_names"]]
            checkpoint = SparseCheckpoint.open(self.args.model, verify_bits=False)
            info = with_manifest(info, checkpoint, served)
        for kernel, layers in sorted(info.kernels.items()):
            logger.info("%d sparse layers on kernel %s", layers, kernel)
        chat = takes_chat(self.args.chat_template, self.client.renderer.tokenizer)
        embeds = "generate" not in tasks
        return replace(info, chat=chat and not embeds, embeds=embeds, quality=known_quality(Path(self.args.model)))

    async def _warm_up(self) -> None:
        """One step through the whole model: what cannot serve fails here, and not in the first client's hands."""
        model = self.client.model_config
        if model.runner_type == "pooling":
            numbers, even = await self.embed([0, 1]), None
        else:
            numbers, even = await self.score([*range(min(4, model.max_model_len - 1))]), 1 / model.get_vocab_size()
        self._weight_checks.check_answer(numbers, even, str(model.dtype))

    @property
    def models(self) -> tuple[str, ...]:
        """Names a request may ask for. See `Engine.models`."""
        return (*self._names(), *self.adapters)

    def _names(self) -> list[str]:
        assert self.args is not None
        return list(self.args.served_model_name or [self.args.model])

    def _adapter(self, name: str) -> Any:
        """vLLM's request for the adapter of this name; None for the model itself."""
        if not name or name in self._names():
            return None
        if name not in self.adapters:
            raise UnknownModelError(f"the adapter {name!r} is no longer loaded")
        return self.adapters[name]

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Generate. See `Engine.generate`."""
        return vllm_requests.generate(self.client, request, self._adapter, self._sampling_defaults)

    def chat(self, body: Mapping[str, Any], origin: Origin = NOBODY) -> AsyncGenerator[Mapping[str, Any], None]:
        """Continue a conversation. See `Engine.chat`."""
        return vllm_requests.chat(self.client, self.chat_serving, body, origin)

    async def tokenize(self, text: str, special_tokens: bool) -> list[int]:
        """Tokens of a text. See `Engine.tokenize`."""
        return await vllm_requests.tokenize(self.client, text, special_tokens)

    async def detokenize(self, token_ids: Sequence[int], special_tokens: bool) -> str:
        """Text of tokens. See `Engine.detokenize`."""
        return await vllm_requests.detokenize(self.client, token_ids, special_tokens)

    async def score(self, token_ids: list[int], model: str = "", origin: Origin = NOBODY) -> list[float]:
        """Log-probabilities. See `Engine.score`."""
        return await vllm_requests.score(self.client, token_ids, self._adapter(model), origin)

    async def embed(self, token_ids: list[int], model: str = "", origin: Origin = NOBODY) -> list[float]:
        """A vector. See `Engine.embed`."""
        return await vllm_requests.embed(self.client, token_ids, self._adapter(model), origin)

    async def probe(self) -> None:
        """One token. See `Engine.probe`."""
        await vllm_requests.probe(self.client)
        for replica in range(self.client.vllm_config.parallel_config.data_parallel_size):
            self.progress.stepped(replica)

    async def rests(self) -> bool:
        """Whether it was told to. See `Engine.rests`."""
        return await vllm_requests.rests(self.client)

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
        vllm_defaults.keep_variables(False)
        client, self.client = self.client, None
        if client is not None:
            if client.output_handler is not None and not client.get_num_unfinished_requests():
                client.output_handler.cancel()  # or it takes the end of the engine's process for an accident
            await asyncio.to_thread(client.shutdown, timeout=grace_s)
        deadline_s = time.monotonic() + _KILL_AFTER_S
        while (started := self._started()) or self.is_loading:  # a killed process takes a moment to leave
            processes.kill(started)
            if time.monotonic() >= deadline_s:
                logger.warning("still there: processes %s", sorted(process.pid for process in started))
                return
            await asyncio.sleep(0.05)

    def _started(self) -> set[psutil.Process]:
        return processes.descendants(os.getpid()) - self._others


def _settle(future: "asyncio.Future[None]", error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
