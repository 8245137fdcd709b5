"""The real server on a sparse checkpoint: two APIs, the same tokens, clients that leave, and a drain.

Starting costs tens of seconds, so one server answers all tests; the last of them ends it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from maskgen.core.quality import QUALITY_FILE, Quality
from sparse_serve.api.pb.v1 import generation_pb2 as pb
from tests import models
from tests.vllm.adapters import save_adapter
from tests.vllm.serving import (
    PROMPT,
    SHAPE,
    SPARSE_LAYERS,
    Running,
    end,
    grpc_request,
    http_error,
    http_request,
    launch,
    make_checkpoint,
    running_requests,
    until,
    wait_idle,
    wait_ready,
)

QUALITY = Quality(20.0, 50.0, 0.75, 0.5, 16, 512, False, ("a.txt",), "sparsegpt", "2:4")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    logs = tmp_path_factory.mktemp("log")
    template = logs / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    checkpoint = make_checkpoint(logs)
    (checkpoint / QUALITY_FILE).write_text(json.dumps(QUALITY.to_dict()))
    save_adapter(logs / "dense", logs / "adapter")
    names = ["--served-model-name", "tiny", "second", "--enable-lora", f"--lora-modules=adapter={logs / 'adapter'}"]
    running = launch(checkpoint, logs, *names, "--drain-s=60", f"--chat-template={template}", "--max-logprobs=25")
    try:
        yield wait_ready(running)
    finally:
        end(running)


def test_both_apis_give_the_same_greedy_tokens(server: Running) -> None:
    over_grpc = server.stub.Generate(grpc_request(24))
    over_http = json.loads(server.get("/v1/completions", http_request(24, return_token_ids=True)))
    (choice,) = over_http["choices"]
    assert list(over_grpc.token_ids) == choice["token_ids"]
    assert over_grpc.text == choice["text"]
    assert len(set(over_grpc.token_ids)) > 2, "a constant output would hide a mistake"
    assert over_grpc.finish_reason == pb.FINISH_REASON_LENGTH and choice["finish_reason"] == "length"
    assert over_grpc.usage.prompt_tokens == over_http["usage"]["prompt_tokens"]
    assert over_grpc.usage.completion_tokens == over_http["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize(
    ("part", "answer"),
    [("/v1/chat/completions", '"finish_reason"'), (" generate --address ", "\n"), ("/metrics", "sparse_serve_ready")],
)
def test_the_printed_lines_work_in_another_terminal(server: Running, part: str, answer: str) -> None:
    (line,) = [line.strip().removeprefix("see ") for line in server.output.splitlines() if part in line]
    curl = shutil.which("curl")
    if curl is None and "curl" in line:
        pytest.skip("no curl")
    environ = os.environ | {"PATH": str(Path(curl or "/bin/sh").parent)}
    done = subprocess.run(line, shell=True, cwd="/", env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert answer in done.stdout


def test_both_apis_stream_what_they_answer_at_once(server: Running) -> None:
    whole = server.stub.Generate(grpc_request(24))
    pieces = list(server.stub.GenerateStream(grpc_request(24, pb.GenerateStreamRequest)))
    assert [id_ for piece in pieces for id_ in piece.token_ids] == list(whole.token_ids)
    assert len(pieces) > 12
    with server.open("/v1/completions", http_request(24, stream=True)) as response:
        lines = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == whole.text


def test_log_probabilities_agree_between_the_apis(server: Running) -> None:
    over_grpc = server.stub.Generate(grpc_request(4, logprobs=2, prompt_logprobs=0))
    over_http = json.loads(server.get("/v1/completions", http_request(4, logprobs=2)))
    http_logprobs = over_http["choices"][0]["logprobs"]["token_logprobs"]
    assert [entry.token.logprob for entry in over_grpc.logprobs] == pytest.approx(http_logprobs, abs=1e-4)
    assert [entry.token.token_id for entry in over_grpc.logprobs] == list(over_grpc.token_ids)
    for entry in over_grpc.logprobs:
        assert entry.top[0] == entry.token, "greedy takes the most likely"
        assert entry.top[0].logprob >= entry.top[1].logprob
    assert len(over_grpc.prompt_logprobs) == over_grpc.usage.prompt_tokens - 1


def test_both_apis_have_one_limit_of_log_probabilities(server: Running) -> None:
    (entry,) = server.stub.Generate(grpc_request(1, logprobs=25)).logprobs
    assert len(entry.top) == 25
    assert http_error(server, "/v1/completions", http_request(1, logprobs=26)).code == 400
    assert json.loads(server.get("/v1/completions", http_request(1, logprobs=25)))


def test_stop_strings_and_stop_tokens_end_generation(server: Running) -> None:
    whole = server.stub.Generate(grpc_request(24))
    third = whole.token_ids[2]
    first_seen = list(whole.token_ids).index(third)
    stopped = server.stub.Generate(grpc_request(24, stop_token_ids=[third]))
    assert stopped.finish_reason == pb.FINISH_REASON_STOP
    assert list(stopped.token_ids) == list(whole.token_ids)[: first_seen + 1]
    word = whole.text[4:6]
    stopped = server.stub.Generate(grpc_request(24, stop=[word]))
    assert stopped.text == whole.text[: whole.text.index(word)]


def test_a_seed_makes_sampling_repeatable_whatever_it_is(server: Running) -> None:
    def sampled(seed: int) -> str:
        sampling = pb.Sampling(max_tokens=16, temperature=1.5, seed=seed, ignore_eos=True)
        return server.stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling)).text

    seeds = (-(2**63), -2, -1, 0, 1, 2, 2**63 - 1)
    once, again = list(map(sampled, seeds)), list(map(sampled, seeds))
    assert once == again
    assert len(set(once[1:-1])) == 5, "a CPU's generator takes 32 of the bits"


def test_every_served_name_and_every_adapter_is_a_model_on_both_apis(server: Running) -> None:
    texts = {}
    for name in ("", "tiny", "second", "adapter"):
        request = grpc_request(24)
        request.model = name
        texts[name] = server.stub.Generate(request).text
        body = http_request(24) | {"model": name or None}
        assert json.loads(server.get("/v1/completions", body))["choices"][0]["text"] == texts[name]
    assert texts[""] == texts["tiny"] == texts["second"] != texts["adapter"]
    info = server.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert list(info.models) == ["tiny", "second", "adapter"]
    assert [model["id"] for model in json.loads(server.get("/v1/models"))["data"]] == list(info.models)
    with pytest.raises(grpc.RpcError, match="NOT_FOUND") as caught:
        server.stub.Generate(pb.GenerateRequest(text="a", model="third"))
    assert caught.value.details() == "model 'third' is not served here; expected one of: 'tiny', 'second', 'adapter'"


def test_a_prompt_that_ends_inside_a_character_is_not_part_of_the_answer(server: Running) -> None:
    tokenizer = models.tokenizer()
    ids = tokenizer.encode("Hello world \N{HOT PEPPER}", add_special_tokens=False)[:-1]
    over_http = json.loads(server.get("/v1/completions", http_request(8, prompt=ids, return_token_ids=True)))
    prompt = pb.TokenIds(ids=ids)
    sampling = pb.Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    over_grpc = server.stub.Generate(pb.GenerateRequest(token_ids=prompt, sampling=sampling))
    (choice,) = over_http["choices"]
    assert choice["token_ids"] == list(over_grpc.token_ids)
    assert choice["text"] == over_grpc.text
    expected = tokenizer.decode(over_grpc.token_ids)
    assert over_grpc.text == expected.rstrip("\ufffd") and over_grpc.text, "what is unfinished at the end is held back"


def test_max_tokens_is_cut_to_what_fits(server: Running) -> None:
    response = server.stub.Generate(grpc_request(10**6))
    assert response.finish_reason == pb.FINISH_REASON_LENGTH
    assert response.usage.prompt_tokens + response.usage.completion_tokens == SHAPE["max_position_embeddings"]


def test_chat_is_vllms_own(server: Running) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}
    answer = json.loads(server.get("/v1/chat/completions", body))
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 4


def test_bad_requests_are_the_clients_fault_on_both_apis(server: Running) -> None:
    long_text = pb.GenerateRequest(text=PROMPT * 200)
    for request, code in (
        (long_text, "INVALID_ARGUMENT"),
        (pb.GenerateRequest(text="a", model="other"), "NOT_FOUND"),
        (grpc_request(4, logprobs=26), "INVALID_ARGUMENT"),
    ):
        with pytest.raises(grpc.RpcError, match=code):
            server.stub.Generate(request)
    assert http_error(server, "/v1/completions", http_request(4) | {"prompt": PROMPT * 200}).code == 400


def test_what_is_asked_and_told_has_limits(server: Running) -> None:
    constraints = {"regex": "a" * 5000}, {"choice": ["a"] * 2000}, {"json": {"enum": ["a" * 70_000]}}
    asked = [{"structured_outputs": constraint} for constraint in constraints]
    for more in (*asked, {"prompt": ["a"] * 100, "n": 2}, {"request_id": "a\nb"}, {"stop": ["a"] * 17}):
        assert http_error(server, "/v1/completions", http_request(4) | more).code == 400
    for path in ("/docs", "/version", "/ping", "/tokenize", "/scale_elastic_ep", "/v1/load_lora_adapter"):
        assert http_error(server, path).code == 404 == http_error(server, path, {}).code
    for path in ("/metrics", "/v1/models", "/sparse-serve/info"):
        assert str(server.directory) not in server.get(path)
    with server.open("/v1/completions", http_request(2)) as response:
        assert response.headers["x-request-id"] in json.load(response)["id"]


def test_info_and_metrics_say_what_is_served(server: Running) -> None:
    info = server.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.dtype, info.max_model_len) == ("tiny", "float32", SHAPE["max_position_embeddings"])
    assert info.sparse_layers == SPARSE_LAYERS == sum(info.kernels.values())
    assert 0 < info.sparse_weight_bytes < info.dense_equivalent_bytes
    for kernel, layers in info.kernels.items():
        assert server.metric("sparse_serve_sparse_layers", kernel=kernel) == layers
    assert server.metric("sparse_serve_weight_bytes", kind="resident") == info.sparse_weight_bytes
    assert server.metric("vllm:prompt_tokens_total") > 0
    assert json.loads(server.get("/sparse-serve/info"))["engine"]["sparse_layers"] == SPARSE_LAYERS


def test_how_good_the_model_is_stands_wherever_people_look(server: Running) -> None:
    assert f"\nquality: {QUALITY.describe()}; that is bad, and `maskgen inspect` says what to try\n" in server.output
    shown = json.loads(server.get("/sparse-serve/info"))["engine"]["quality"]
    assert (shown["dense_perplexity"], shown["perplexity"], shown["texts"]) == (20.0, 50.0, ["a.txt"])
    assert shown["bad"] and shown["advice"] == QUALITY.advice()
    told = server.stub.GetModelInfo(pb.GetModelInfoRequest()).quality
    assert (told.dense_perplexity, told.perplexity, told.kl_divergence, told.top1_agreement) == (20.0, 50.0, 0.75, 0.5)
    assert (told.windows, told.window_tokens, list(told.texts), told.bad) == (16, 512, ["a.txt"], True)


def test_a_cancelled_grpc_stream_is_aborted_in_the_engine(server: Running) -> None:
    before = server.metric("sparse_serve_cancelled_total", api="grpc")
    call = server.stub.GenerateStream(grpc_request(1000, pb.GenerateStreamRequest))
    received = len(list(next(call).token_ids))
    call.cancel()
    until(lambda: server.metric("sparse_serve_cancelled_total", api="grpc") == before + 1)
    until(lambda: running_requests(server) == 0)
    assert received < 1000


def test_a_cancelled_unary_call_is_aborted_in_the_engine(server: Running) -> None:
    before = server.metric("sparse_serve_cancelled_total", api="grpc")
    with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
        server.stub.Generate(grpc_request(1000), timeout=0.15)
    until(lambda: server.metric("sparse_serve_cancelled_total", api="grpc") == before + 1)
    until(lambda: running_requests(server) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_an_http_client_that_leaves_is_aborted_in_the_engine(server: Running, stream: bool) -> None:
    before = server.metric("sparse_serve_cancelled_total", api="http")
    host, port = server.http.removeprefix("http://").split(":")
    body = json.dumps(http_request(1000, stream=stream)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert b"200 OK" in connection.recv(1000)
        until(lambda: running_requests(server) == 1)
    until(lambda: server.metric("sparse_serve_cancelled_total", api="http") == before + 1)
    until(lambda: running_requests(server) == 0)


def test_ctrl_c_for_the_whole_group_drains_both_apis_and_ends_with_0(server: Running) -> None:
    """A terminal sends Ctrl-C to every process of its group. The engine is slow here, and then the server is: neither
    may leave before the last token of a request has arrived."""
    answers: dict[str, Any] = {}

    def over_grpc() -> None:
        answers["grpc"] = server.stub.Generate(grpc_request(900))

    def over_http() -> None:
        answers["http"] = json.loads(server.get("/v1/completions", http_request(900, return_token_ids=True)))

    threads = [threading.Thread(target=target) for target in (over_grpc, over_http)]
    for thread in threads:
        thread.start()
    until(lambda: running_requests(server) == 2)
    engine = psutil.Process(server.engine_pid())
    engine.suspend()
    os.killpg(server.process.pid, signal.SIGINT)
    until(lambda: "stopping: waiting for 2 running requests" in (server.directory / "err").read_text())
    refused = http_error(server, "/v1/completions", http_request(4))
    assert (refused.code, refused.headers["retry-after"]) == (503, "1")
    with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
        server.stub.Generate(grpc_request(4))
    assert http_error(server, "/ready").code == 503
    os.killpg(server.process.pid, signal.SIGINT)
    server.process.send_signal(signal.SIGSTOP)
    engine.resume()
    wait_idle(engine)
    server.process.send_signal(signal.SIGCONT)
    for thread in threads:
        thread.join(60)
    assert len(answers["grpc"].token_ids) == 900
    assert answers["http"]["choices"][0]["token_ids"] == list(answers["grpc"].token_ids)
    assert server.process.wait(30) == 0
    server.check_nobody_is_left()
