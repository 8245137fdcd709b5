"""A client of `sparse-serve serve` over gRPC: `Client`, and `AsyncClient` for asyncio. Needs no torch and no vLLM.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("The import statement", max_tokens=16).text)
        for piece in client.chat_stream([{"role": "user", "content": "Who are you?"}]):
            print(piece.content, end="")

Answers are the messages of `proto/sparse_serve/v1/`, which are typed. A call that is refused because the server starts,
drains or is full is made again, up to `attempts` times with growing pauses, as long as nothing has been answered. What
ends a call otherwise is a `CallError`.
"""

from sparse_serve.client.aio import AsyncClient
from sparse_serve.client.connection import CallError, Connection, Tls
from sparse_serve.client.requests import Message, Sampling, Tool
from sparse_serve.client.sync import Client

__all__ = ["AsyncClient", "CallError", "Client", "Connection", "Message", "Sampling", "Tls", "Tool"]
