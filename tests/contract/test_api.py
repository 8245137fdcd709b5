"""Every file of `sparse_serve/api/` is an API: same constructor, same life, no knowledge of the others."""

import ast
import inspect
import pkgutil
import signal
from importlib import import_module
from types import ModuleType

import pytest
from prometheus_client import CollectorRegistry

from sparse_serve import api
from sparse_serve.cli import serve
from sparse_serve.cli.restart import StopRequest
from sparse_serve.engine.fake import FakeEngine
from sparse_serve.server.context import Api, ServerContext
from sparse_serve.server.lifecycle import shared
from sparse_serve.server.metrics import Metrics
from sparse_serve.server.settings import Settings

NOT_APIS = {
    "grpc_access",
    "grpc_admin",
    "grpc_calls",
    "grpc_chat",
    "grpc_messages",
    "grpc_smg",
    "grpc_standard",
    "grpc_status",
    "grpc_tokens",
    "pb",
}
NAMES = [module.name for module in pkgutil.iter_modules(api.__path__) if module.name not in NOT_APIS]
LIFE = [name for name in vars(Api) if not name.startswith("_")]


@pytest.fixture(params=NAMES)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return import_module(f"sparse_serve.api.{request.param}")


def context() -> ServerContext:
    settings = Settings(http_port=0, grpc_port=0)
    return shared(FakeEngine(), settings, Metrics(CollectorRegistry()))


def test_the_apis_are_known() -> None:
    assert {"grpc_v1", "http_openai", "ops"} <= set(NAMES)
    assert LIFE == ["start", "serve", "drain", "stop"]


async def test_every_api_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sparse-serve serve` names the APIs; a new file that it does not name would never be reached."""
    served: list[str] = []

    class Recorder:
        def __init__(self, engine: object, settings: object, apis: list[ModuleType], *others: object) -> None:
            served.extend(module.__name__.rpartition(".")[2] for module in apis)

        is_stopping = False

        def stop(self) -> None: ...

        async def run(self) -> int:
            return 0

    monkeypatch.setattr(serve, "Server", Recorder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert await serve._serve(FakeEngine(), Settings(), lambda event: None, StopRequest()) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert sorted(served) == sorted(NAMES)


def test_create_makes_an_api(module: ModuleType) -> None:
    api = module.create(context())
    for name in LIFE:
        ours, contract = getattr(type(api), name), getattr(Api, name)
        assert inspect.iscoroutinefunction(ours), f"{name} is not async"
        assert inspect.signature(ours) == inspect.signature(contract)
        assert ours.__doc__


async def test_an_api_that_never_served_can_be_closed(module: ModuleType) -> None:
    """What happens when the engine does not start."""
    never_started = module.create(context())
    await never_started.stop(0.0)
    started = module.create(context())
    address = await started.start()
    assert address == "" or int(address.rpartition(":")[2]) > 0
    await started.stop(0.0)
    await started.stop(0.0)


def test_apis_do_not_import_each_other(module: ModuleType) -> None:
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert not imported & {f"sparse_serve.api.{name}" for name in NAMES}
