"""The services of `sparse_serve.v1` beyond generation on the real engine, each held against the HTTP API."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sparse_serve.api.pb.v1 import chat_pb2, chat_pb2_grpc, tokens_pb2, tokens_pb2_grpc
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from tests.browser import page
from tests.docs import elsewhere
from tests.vllm.serving import (
    PROMPT,
    SPARSE_LAYERS,
    Running,
    end,
    grpc_request,
    http_request,
    launch,
    make_checkpoint,
    until,
    wait_ready,
)
from tests.vllm.spans import Collector, collecting


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: tuple[Collector, str]) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("services")
    template = folder / "chat.jinja"
    template.write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
        "{% if message.role == 'odd' %}{{ raise_exception('who is odd?') }}{% endif %}{% endfor %}"
    )
    flags = [f"--chat-template={template}", "--scheduling-policy=priority", "--extra-routes=/tokenize"]
    flags += ["--access-log", "--log-json", "--served-model-name=tiny", f"--otlp-traces-endpoint={collector[1]}"]
    checkpoint = make_checkpoint(folder)
    (checkpoint / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        running = launch(checkpoint, folder, *flags)
    try:
        yield wait_ready(running)
    finally:
        end(running)


@pytest.mark.parametrize("shown", elsewhere.run_by("tests/vllm/test_services.py"))
def test_what_the_manual_asks_a_server_is_answered(server: Running, shown: str) -> None:
    """With the address and the model's name of this one."""
    here = {"http://127.0.0.1:8000": server.http, "127.0.0.1:50051": server.grpc_address}
    here |= {'"NAME"': '"tiny"', '"SPARSE"': '"tiny"', "--model support": "--model tiny"}
    for there, name in here.items():
        shown = shown.replace(there, name)
    if shown.startswith("sparse-serve generate") and "--address" not in shown:
        shown += f" --address {server.grpc_address}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", shown], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert not shown.startswith("curl") or json.loads(done.stdout)["choices"]


def chat(server: Running) -> Any:
    return chat_pb2_grpc.ChatServiceStub(server.channel)


def tokens(server: Running) -> Any:
    return tokens_pb2_grpc.TokenServiceStub(server.channel)


MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]


def test_a_chat_is_answered_as_over_http_at_once_and_in_pieces(server: Running) -> None:
    sampling = pb.Sampling(max_tokens=24, temperature=0, ignore_eos=True)
    asked = {"messages": [chat_pb2.Message(**message) for message in MESSAGES], "sampling": sampling}
    whole = chat(server).Chat(chat_pb2.ChatRequest(**asked))
    pieces = list(chat(server).ChatStream(chat_pb2.ChatStreamRequest(**asked)))
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    over_http = json.loads(server.get("/v1/chat/completions", body))
    (choice,) = over_http["choices"]
    assert whole.choices[0].message.content == choice["message"]["content"] != ""
    assert "".join(piece.content for piece in pieces) == choice["message"]["content"]
    assert whole.choices[0].finish_reason == pieces[-2].finish_reason == choice["finish_reason"] == "length"
    assert whole.usage.prompt_tokens == pieces[-1].usage.prompt_tokens == over_http["usage"]["prompt_tokens"]
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
        chat(server).Chat(chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="user", content="a" * 100_000)]))


def test_a_chat_may_have_any_seed(server: Running) -> None:
    def said(seed: int) -> str:
        sampling = pb.Sampling(max_tokens=16, temperature=1.5, seed=seed, ignore_eos=True)
        asked = chat_pb2.ChatRequest(messages=[chat_pb2.Message(**MESSAGES[1])], sampling=sampling)
        return chat(server).Chat(asked).choices[0].message.content

    assert said(-1) == said(-1) != said(1)


def test_what_a_chat_template_refuses_is_the_clients_fault(server: Running) -> None:
    with pytest.raises(grpc.RpcError, match="who is odd") as caught:
        chat(server).Chat(chat_pb2.ChatRequest(messages=[chat_pb2.Message(role="odd", content="a")]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_what_the_models_own_settings_say_of_sampling_holds_on_both_apis(server: Running) -> None:
    """They are read at the start, not for every request."""
    (server.directory / "sparse" / "generation_config.json").unlink(missing_ok=True)
    over_grpc, penalised, plain = (
        list(server.stub.Generate(grpc_request(24, **more)).token_ids)
        for more in ({}, {"repetition_penalty": 1.5}, {"repetition_penalty": 1.0})
    )
    body = http_request(24, return_token_ids=True)
    assert over_grpc == penalised != plain
    assert json.loads(server.get("/v1/completions", body))["choices"][0]["token_ids"] == over_grpc


def test_several_sequences_are_those_of_their_seeds(server: Running) -> None:
    request = pb.GenerateRequest(text=PROMPT, sampling=pb.Sampling(max_tokens=12, temperature=1.5, seed=3, n=3))
    one, again = server.stub.Generate(request), server.stub.Generate(request)
    texts = [sequence.text for sequence in one.sequences]
    assert texts == [sequence.text for sequence in again.sequences] and len({*texts}) == 3
    assert one.usage.completion_tokens == sum(len(sequence.token_ids) for sequence in one.sequences)
    assert 0 < one.usage.first_token_s <= one.usage.elapsed_s
    stream = pb.GenerateStreamRequest(text=PROMPT, sampling=request.sampling, priority=-1)
    pieces = list(server.stub.GenerateStream(stream))
    assert ["".join(piece.text for piece in pieces if piece.index == index) for index in range(3)] == texts


@pytest.mark.parametrize(
    ("constraint", "holds"),
    [
        (pb.Constraint(choice=pb.Choice(texts=["yes", "no"])), lambda text: text in ("yes", "no")),
        (pb.Constraint(regex="[0-9]{3}"), lambda text: len(text) == 3 and text.isdigit()),
        (pb.Constraint(json_schema='{"enum": ["a", 1]}'), lambda text: json.loads(text) in ("a", 1)),
        (pb.Constraint(grammar='root ::= "x" "y"'), lambda text: text == "xy"),
    ],
    ids=["choice", "regex", "json", "grammar"],
)
def test_a_constraint_holds(server: Running, constraint: pb.Constraint, holds: Any) -> None:
    sampling = pb.Sampling(max_tokens=20, temperature=0, constraint=constraint)
    assert holds(server.stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling)).text)


@pytest.mark.parametrize(
    "constraint",
    [pb.Constraint(regex="(["), pb.Constraint(grammar="not a grammar"), pb.Constraint(json_schema='{"type": 5}')],
)
def test_a_constraint_that_cannot_be_read_is_the_clients_fault(server: Running, constraint: pb.Constraint) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        server.stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=pb.Sampling(constraint=constraint)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_bias_decides(server: Running) -> None:
    wanted = server.stub.Generate(grpc_request(1)).token_ids[0] + 1
    biased = server.stub.Generate(grpc_request(4, logit_bias={wanted: 100.0}))
    assert list(biased.token_ids) == [wanted] * 4


def test_scores_are_the_log_probabilities_of_a_prompt(server: Running) -> None:
    generated = server.stub.Generate(grpc_request(1, prompt_logprobs=0))
    ids = [entry.token.token_id for entry in generated.prompt_logprobs]
    passages = [tokens_pb2.Passage(text=PROMPT), tokens_pb2.Passage(token_ids=pb.TokenIds(ids=ids))]
    text, bare = tokens(server).Score(tokens_pb2.ScoreRequest(passages=passages)).scores
    assert list(text.token_ids)[1:] == ids == list(bare.token_ids)
    assert list(text.logprobs) == pytest.approx([entry.token.logprob for entry in generated.prompt_logprobs], abs=1e-4)
    assert len(bare.logprobs) == len(ids) - 1


def test_text_becomes_tokens_as_over_http_and_text_again(server: Running) -> None:
    over_http = json.loads(server.get("/tokenize", {"model": "tiny", "prompt": PROMPT}))["tokens"]
    assert list(tokens(server).Tokenize(tokens_pb2.TokenizeRequest(text=PROMPT)).token_ids) == over_http
    request = tokens_pb2.DetokenizeRequest(token_ids=over_http, without_special_tokens=True)
    assert tokens(server).Detokenize(request).text == PROMPT
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
        tokens(server).Tokenize(tokens_pb2.TokenizeRequest(text="a" * 1_000_000))


def test_info_names_what_the_checkpoint_is(server: Running) -> None:
    info = server.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.pattern, info.values) == ("2:4", "float")
    for digest in (info.mask_digest, info.recipe_digest, info.base_digest):
        assert digest.startswith("sha256:")
    (model,) = server.stub.ListModels(pb.ListModelsRequest()).models
    assert (model.name, model.is_adapter) == ("tiny", False)
    assert json.loads(server.get("/v1/completions", http_request(1) | {"priority": 5}))


def test_a_line_of_the_log_has_what_the_client_knows(server: Running) -> None:
    _, call = server.stub.Generate.with_call(grpc_request(1))
    id_ = dict(call.trailing_metadata())["x-request-id"]
    (log,) = (server.directory / "sparse-serve" / "log").iterdir()
    (line,) = [line for line in log.read_text().splitlines() if id_ in line]
    shown = json.loads(line)
    assert (shown["name"], shown["code"], shown["method"]) == ("sparse_serve.access", "OK", "Generate")


def test_the_page_shows_the_model_and_talks_to_it(server: Running, tmp_path: Path) -> None:
    with page(tmp_path) as shown:
        shown.go(f"{server.http}/")
        shown.until("document.querySelector('#phase')?.textContent === 'ready' && document.title === 'tiny'")
        assert f"{SPARSE_LAYERS} (2:4)" in shown.until("document.querySelector('#facts').textContent")
        assert "first token" in shown.evaluate("document.querySelector('#startup').textContent")
        shown.evaluate(
            "document.querySelector('#text').value = 'Who are you?'; document.querySelector('#send').click()"
        )
        told = shown.until("document.querySelector('#speed').textContent", 60.0)
        asked, said = shown.evaluate("[...document.querySelectorAll('.said')].map((node) => node.textContent)")
        written = int(told.split(" tokens")[0])
        assert asked == "Who are you?" and said and written > 1
        shown.until(
            f"Number(document.querySelector('#load dd:last-child').textContent.replaceAll(',', '')) >= {written}"
        )
        assert shown.errors == []


def test_the_parts_of_the_start_are_metrics(server: Running) -> None:
    phases = ["imports", "verification", "configuration", "workers", "weights", "cache and warm-up", "first token"]
    assert all(server.metric("sparse_serve_startup_seconds", phase=phase) > 0 for phase in phases)


def test_the_manuals_client_works(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    (block,) = [
        block for block in re.findall(r"^```python\n(.*?)^```$", manual, re.DOTALL | re.MULTILINE) if "def ask" in block
    ]
    names: dict[str, Any] = {}
    exec(block, names)
    names["ask"](server.grpc_address)
    printed = capsys.readouterr().out
    assert "INVALID_ARGUMENT BAD_REQUEST ['temperature']" in printed and re.search("(yes|no)\\[-", printed)


def _trace_id(number: int) -> str:
    return f"{number:032x}"


def test_a_span_of_every_request_is_in_its_clients_trace(server: Running, collector: tuple[Collector, str]) -> None:
    def told(number: int) -> list[tuple[str, str]]:
        return [("traceparent", f"00-{_trace_id(number)}-00000000000000aa-01"), ("x-request-id", f"mine-{number}")]

    server.stub.Generate(grpc_request(2), metadata=told(1))
    list(server.stub.GenerateStream(grpc_request(2, pb.GenerateStreamRequest), metadata=told(2)))
    message = chat_pb2.Message(role="user", content=PROMPT)
    chats = chat_pb2_grpc.ChatServiceStub(server.channel)
    chats.Chat(chat_pb2.ChatRequest(messages=[message], sampling=pb.Sampling(max_tokens=2)), metadata=told(3))
    passages = [tokens_pb2.Passage(text=PROMPT)]
    tokens_pb2_grpc.TokenServiceStub(server.channel).Score(tokens_pb2.ScoreRequest(passages=passages), metadata=told(4))
    _post(server, "/v1/completions", http_request(2), told(5))
    _post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}, told(6))

    def found() -> dict[str, Any]:
        spans = [span for span in collector[0].spans if span.name == "llm_request"]
        return {span.trace_id.hex(): span for span in spans if int(span.trace_id.hex(), 16) < 9}

    until(lambda: len(found()) == 6, 120.0)
    for number in range(1, 7):
        span = found()[_trace_id(number)]
        assert span.parent_span_id.hex() == "00000000000000aa"
        (id_,) = [one.value.string_value for one in span.attributes if one.key == "gen_ai.request.id"]
        assert f"mine-{number}" in id_


def _post(server: Running, path: str, body: Any, headers: list[tuple[str, str]]) -> None:
    content = {"content-type": "application/json", **dict(headers)}
    request = urllib.request.Request(server.http + path, json.dumps(body).encode(), content)
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 200
