"""The demo with its real model: the dense one answers, and the sparse one is served with its chat template.

Needs the package of `deploy/locks/demo.txt`, which `make test` installs. The masks are magnitude's, which take seconds:
these tests are about the way from the package to a chat, and not about what a sparse model answers.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer

import maskgen
from tests.vllm.serving import Running, end, grpc_request, launch, wait_ready

pytestmark = pytest.mark.timeout(900)  # converting takes 20 s of a core, which other tests want, too
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> maskgen.DemoResult:
    return maskgen.demo(maskgen.DemoRequest(out=tmp_path_factory.mktemp("demo") / "demo"))


@pytest.fixture(scope="module")
def server(demo: maskgen.DemoResult, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    maskgen.prune(maskgen.PruneRequest(recipe="magnitude", model=demo.model, out=folder / "sparse"))
    running = launch(folder / "sparse", folder, "--served-model-name=demo", "--max-model-len=512")
    try:
        yield wait_ready(running)
    finally:
        end(running)


def test_the_dense_model_answers(demo: maskgen.DemoResult) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(demo.model), maskgen.load(demo.model)
    chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**chat, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert tokenizer.decode(ids[0, chat["input_ids"].shape[1] :], skip_special_tokens=True).startswith(
        "The capital of France is Paris"
    )


def test_the_printed_call_is_a_chat_through_the_models_template(demo: maskgen.DemoResult, server: Running) -> None:
    (line,) = [line for line in server.output.splitlines() if "/v1/chat/completions" in line]
    done = subprocess.run([*shlex.split(line), "--silent", "--fail"], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert answer["usage"]["prompt_tokens"] == len(asked)
    assert answer["usage"]["completion_tokens"] >= 1 and answer["choices"][0]["message"]["role"] == "assistant"


def test_grpc_goes_on_with_text(server: Running) -> None:
    assert len(server.stub.Generate(grpc_request(5)).token_ids) == 5
