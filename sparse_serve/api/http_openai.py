"""The OpenAI API over HTTP: vLLM's own application, mounted, not rewritten.

`build_app` and `init_app_state` are what `vllm serve` itself uses: completions, chat, models, streaming, tool calls and
`/metrics` behave as documented there, and `/metrics` shows this server's metrics too, as both use the default registry.
Four things are ours. The listener stands before it (admission, counting, body size). Its lifespan is run here,
because the listener's server started long before this application existed. The server object that vLLM may ask to exit
when the engine dies is a dummy: this process watches the engine itself, and ends every API in order. And the list of
models names no directory.
"""

import contextlib
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from sparse_serve.runtime.errors import EngineStartError
from sparse_serve.runtime.startup_error import reason
from sparse_serve.server.context import ServerContext
from sparse_serve.server.cors import Cors


def create(context: ServerContext) -> "OpenAiApi":
    """The OpenAI API, mounted on the HTTP listener."""
    return OpenAiApi(context)


class OpenAiApi:
    """Implements `Api`."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._lifespan = contextlib.AsyncExitStack()

    async def start(self) -> str:
        """Without a main application the listener answers "unavailable", and tells browsers what pages of other origins
        may do, as vLLM will."""
        self._context.listener.set_cors(self._cors)
        return ""

    def _cors(self) -> Cors | None:
        args = getattr(self._context.engine, "args", None)  # None until vLLM's flags have been read
        if args is None:
            return None
        return Cors(args.allowed_origins, args.allow_credentials, args.allowed_methods, args.allowed_headers)

    async def serve(self) -> None:
        """Build vLLM's application on the running engine and mount it."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        from sparse_serve.engine.vllm_engine import VllmEngine

        engine = self._context.engine
        if not isinstance(engine, VllmEngine) or engine.args is None:
            raise EngineStartError(f"the OpenAI API needs a started vLLM engine, not {type(engine).__name__}")
        tasks = await engine.client.get_supported_tasks()
        app = build_app(engine.args, tasks, engine.client.model_config)
        try:
            await init_app_state(engine.client, app.state, engine.args, tasks)
        except Exception as error:
            raise EngineStartError(f"the OpenAI API did not start: {reason(error)}") from error
        models = app.state.openai_serving_models
        engine.adapters, engine.chat_serving = models.lora_requests, getattr(app.state, "openai_serving_chat", None)
        models.show_available_models = _without_paths(models.show_available_models)
        app.state.server = SimpleNamespace(should_exit=False)
        await self._lifespan.enter_async_context(app.router.lifespan_context(app))
        self._context.listener.set_main(app)

    async def drain(self) -> None:
        """Nothing to do: the listener refuses new requests."""

    async def stop(self, grace_s: float) -> None:
        """End the application's lifespan. Its requests are the listener's to finish, before this."""
        await self._lifespan.aclose()


def _without_paths(listing: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """vLLM's list of models; each has a root, which is where its files are, and here the model's own name."""

    async def listed() -> Any:
        models = await listing()
        for model in models.data:
            model.root = model.id
        return models

    return listed
