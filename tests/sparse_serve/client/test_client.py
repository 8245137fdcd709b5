"""The Python client, of threads and of asyncio, against a server with a fake engine."""

import asyncio
import inspect
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.client import AsyncClient, CallError, Client, Tls
from sparse_serve.client import requests as client_requests
from sparse_serve.engine.fake import INFO, FakeEngine
from tests.sparse_serve.running import running
from tests.sparse_serve.server.test_tls import Authority

MESSAGES: list[client_requests.Message] = [{"role": "user", "content": "hello"}]
TOOLS: list[client_requests.Tool] = [{"name": "find", "description": "finds", "parameters": {"type": "object"}}]


def everything(address: str) -> list[object]:
    """One of each call."""
    with Client(address, timeout_s=10) as client:
        return [
            client.generate("ab", max_tokens=3, n=2, stop=["x"]).text,
            client.generate([97, 98], max_tokens=3).text,
            [piece.text for piece in client.stream("ab", max_tokens=3)],
            client.chat(MESSAGES, tools=TOOLS, max_tokens=5).choices[0].message.content,
            [piece.content for piece in client.chat_stream(MESSAGES)],
            [len(score.logprobs) for score in client.score(["ab", [1, 2, 3]])],
            client.tokenize("ab"),
            client.tokenize("ab", special_tokens=False),
            client.detokenize([97, 98]),
            [model.name for model in client.models()],
            client.info().max_model_len,
        ]


async def everything_async(address: str) -> list[object]:
    async with AsyncClient(address, timeout_s=10) as client:
        return [
            (await client.generate("ab", max_tokens=3, n=2, stop=["x"])).text,
            (await client.generate([97, 98], max_tokens=3)).text,
            [piece.text async for piece in client.stream("ab", max_tokens=3)],
            (await client.chat(MESSAGES, tools=TOOLS, max_tokens=5)).choices[0].message.content,
            [piece.content async for piece in client.chat_stream(MESSAGES)],
            [len(score.logprobs) for score in await client.score(["ab", [1, 2, 3]])],
            await client.tokenize("ab"),
            await client.tokenize("ab", special_tokens=False),
            await client.detokenize([97, 98]),
            [model.name for model in await client.models()],
            (await client.info()).max_model_len,
        ]


async def test_both_clients_make_every_call() -> None:
    async with running() as server:
        over_asyncio = await everything_async(server.grpc_address)
        assert over_asyncio == await asyncio.to_thread(everything, server.grpc_address)
    assert over_asyncio[:3] == ["aba", "aba", ["a", "b", "a"]]
    assert over_asyncio[3] == "hello" and "".join(over_asyncio[4]) == "hello"
    assert over_asyncio[5:] == [[2, 2], [1, 97, 98], [97, 98], "ab", ["fake"], INFO.max_model_len]


def test_both_clients_have_the_same_calls_with_the_same_arguments() -> None:
    def calls(client: type) -> dict[str, list[str]]:
        members = vars(client).items()
        return {name: list(inspect.signature(call).parameters) for name, call in members if not name.startswith("_")}

    assert calls(Client) == calls(AsyncClient)


async def test_an_error_says_code_reason_field_and_when_to_try_again() -> None:
    async with running(max_sequences_per_client=2) as server, AsyncClient(server.grpc_address, attempts=1) as client:
        with pytest.raises(CallError, match=f"{server.grpc_address}: INVALID_ARGUMENT: temperature is 9") as caught:
            await client.generate("a", temperature=9)
        assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "BAD_REQUEST")
        assert (caught.value.fields, caught.value.retry_s) == (["temperature"], None)
        server.engine.delay_s = 0.05
        busy = asyncio.ensure_future(client.generate("a", n=2, max_tokens=20))
        await server.until(lambda: server.engine.unfinished == 1)
        with pytest.raises(CallError) as caught:
            await client.generate("a")
        assert (caught.value.code, caught.value.reason, caught.value.retry_s) == ("RESOURCE_EXHAUSTED", "TOO_MANY", 1.0)
        await busy
        with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
            server.engine.delay_s = 1.0
            await client.generate("a", timeout_s=0.1)


async def test_a_server_that_starts_is_waited_for() -> None:
    async with running(FakeEngine(start_s=1000.0), ready=False) as server:
        async with AsyncClient(server.grpc_address, attempts=1) as impatient:
            with pytest.raises(CallError, match="UNAVAILABLE"):
                await impatient.generate("ab")
        asyncio.get_running_loop().call_later(0.8, server.engine.start_over.set)
        async with AsyncClient(server.grpc_address, attempts=5) as patient:
            assert (await patient.generate("ab", max_tokens=2)).text == "ab"


async def test_a_stream_that_is_left_is_cancelled() -> None:
    async with running(FakeEngine(delay_s=0.01)) as server, AsyncClient(server.grpc_address) as client:
        stream = client.stream("ab", max_tokens=4000)
        assert (await anext(stream)).text == "a"
        await stream.aclose()
        await server.until(lambda: len(server.engine.aborted) == 1)

        def leave() -> None:
            with Client(server.grpc_address) as other:
                pieces = other.stream("ab", max_tokens=4000)
                next(pieces)
                pieces.close()

        await asyncio.to_thread(leave)
        await server.until(lambda: len(server.engine.aborted) == 2)


async def test_keys_and_certificates(tmp_path: Path) -> None:
    authority = Authority.new("mine")
    certificate, key = authority.write(tmp_path, "server")
    mine, mine_key = authority.write(tmp_path, "client")
    ca, keys = tmp_path / "ca.pem", tmp_path / "keys"
    ca.write_bytes(authority.pem)
    keys.write_text("0123456789abcdef")
    flags = {"tls_cert": str(certificate), "tls_key": str(key), "tls_client_ca": str(ca), "api_keys": str(keys)}
    async with running(**flags) as server:
        tls = Tls(ca, mine, mine_key)
        async with AsyncClient(server.grpc_address, key="0123456789abcdef", tls=tls) as client:
            assert (await client.generate("ab", max_tokens=2)).text == "ab"
        async with AsyncClient(server.grpc_address, key="wrong", tls=tls) as client:
            with pytest.raises(CallError, match="UNAUTHENTICATED"):
                await client.generate("ab")


def test_options_become_fields() -> None:
    made = client_requests.sampling({"json_schema": {"type": "object"}, "logit_bias": {5: 1.5}, "stop": ["a"]})
    assert made.constraint.json_schema == '{"type": "object"}' and made.logit_bias == {5: 1.5}
    assert client_requests.sampling({"choice": ["a", "b"]}).constraint.choice.texts == ["a", "b"]
    assert {*client_requests.Sampling.__annotations__} == {
        *(field.name for field in pb.Sampling.DESCRIPTOR.fields if field.name != "constraint"),
        *(field.name for field in pb.Constraint.DESCRIPTOR.fields),
    }
    with pytest.raises(ValueError, match="json_schema and regex"):
        client_requests.sampling({"json_schema": "{}", "regex": "a"})
    with pytest.raises(TypeError, match="temprature is no option"):
        client_requests.sampling({"temprature": 1})


def test_a_client_imports_no_server_and_no_torch() -> None:
    code = "import sys, sparse_serve.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "grpc" in loaded
    assert not {"uvicorn", "starlette", "prometheus_client", "pydantic", "torch", "numpy"} & set(loaded)
    assert grpc.__name__ == "grpc"


async def test_embeddings() -> None:
    engine = FakeEngine()
    engine.embeds = True
    async with running(engine) as server, AsyncClient(server.grpc_address) as client:
        found = await client.embed(["ab", [5, 6]])
        assert found == await asyncio.to_thread(_embed, server.grpc_address)
    assert [len(vector) for vector in found] == [2, 2]


def _embed(address: str) -> list[list[float]]:
    with Client(address) as client:
        return client.embed(["ab", [5, 6]])
