"""`sparse_serve/api/pb/` is what `proto/generate.py` makes of `proto/`, and the protocol keeps its promises."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTO = "\n".join(path.read_text() for path in sorted((ROOT / "proto/sparse_serve/v1").glob("*.proto")))


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_up_to_date(generator: ModuleType) -> None:
    made = generator.generate()
    committed = {
        str(path.relative_to(generator.OUT_DIR)): path.read_text()
        for path in generator.OUT_DIR.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    assert made == committed, "run `make proto`"


def test_generated_files_import_only_their_own_package(generator: ModuleType) -> None:
    for name, text in generator.generate().items():
        for imported in re.findall(r"^from (sparse_serve\S*) import", text, re.MULTILINE):
            assert imported.startswith("sparse_serve.api.pb."), f"{name} imports {imported}"


def test_field_numbers_never_change() -> None:
    """A new field is added here; a line that changes is a protocol that old clients misread."""
    from sparse_serve.api.pb.v1 import chat_pb2, generation_pb2, tokens_pb2

    assert _numbers(generation_pb2) == {
        "TokenIds": "ids=1",
        "Sampling": "max_tokens=1 temperature=2 top_p=3 top_k=4 min_p=5 seed=6 stop=7 stop_token_ids=8 ignore_eos=9 "
        "presence_penalty=10 frequency_penalty=11 repetition_penalty=12 logprobs=13 prompt_logprobs=14 n=15 "
        "logit_bias=16 min_tokens=17 constraint=18",
        "Constraint": "json_schema=1 json_object=2 regex=3 choice=4 grammar=5",
        "Choice": "texts=1",
        "GenerateRequest": "text=1 token_ids=2 sampling=3 model=4 priority=5",
        "GenerateStreamRequest": "text=1 token_ids=2 sampling=3 model=4 priority=5",
        "TokenLogprob": "token_id=1 logprob=2",
        "PositionLogprobs": "token=1 top=2",
        "Usage": "prompt_tokens=1 completion_tokens=2 cached_prompt_tokens=3 first_token_s=4 elapsed_s=5",
        "GenerateResponse": "text=1 token_ids=2 finish_reason=3 usage=4 logprobs=5 prompt_logprobs=6 sequences=7",
        "Sequence": "text=1 token_ids=2 finish_reason=3 logprobs=4",
        "GenerateStreamResponse": "text=1 token_ids=2 finish_reason=3 usage=4 logprobs=5 prompt_logprobs=6 index=7",
        "ListModelsRequest": "",
        "ListModelsResponse": "models=1",
        "Model": "name=1 is_adapter=2",
        "GetModelInfoRequest": "",
        "GetModelInfoResponse": "model=1 max_model_len=2 vocab_size=3 dtype=4 sparse_layers=5 dense_layers=6 kernels=7 "
        "sparse_weight_bytes=8 dense_equivalent_bytes=9 models=10 quality=11 pattern=12 values=13 mask_digest=14 "
        "recipe_digest=15 base_digest=16 server_version=17 embeds=18",
        "Quality": "dense_perplexity=1 perplexity=2 kl_divergence=3 top1_agreement=4 windows=5 window_tokens=6 texts=7 "
        "bad=8 advice=9",
    }
    asked = "messages=1 tools=2 tool_choice=3 sampling=4 model=5"
    assert _numbers(chat_pb2) == {
        "Message": "role=1 content=2 tool_calls=3 tool_call_id=4 name=5",
        "Tool": "name=1 description=2 parameters=3",
        "ToolCall": "id=1 name=2 arguments=3 index=4",
        "ChatRequest": asked,
        "ChatStreamRequest": asked,
        "ChatChoice": "message=1 reasoning=2 finish_reason=3",
        "ChatResponse": "choices=1 usage=2",
        "ChatStreamResponse": "index=1 content=2 reasoning=3 tool_calls=4 finish_reason=5 usage=6",
    }
    assert _numbers(tokens_pb2) == {
        "Passage": "text=1 token_ids=2",
        "ScoreRequest": "passages=1 model=2",
        "ScoreResponse": "scores=1",
        "Score": "token_ids=1 logprobs=2",
        "EmbedRequest": "passages=1 model=2",
        "EmbedResponse": "embeddings=1",
        "Embedding": "values=1 prompt_tokens=2",
        "TokenizeRequest": "text=1 without_special_tokens=2",
        "TokenizeResponse": "token_ids=1",
        "DetokenizeRequest": "token_ids=1 without_special_tokens=2",
        "DetokenizeResponse": "text=1",
    }


def test_field_numbers_of_the_operators_service_never_change() -> None:
    from sparse_serve.api.pb.v1 import admin_pb2

    assert _numbers(admin_pb2) == {
        "AbortRequest": "request_id=1",
        "AbortResponse": "requests=1",
        "DrainRequest": "",
        "DrainResponse": "requests=1 limit_s=2",
        "SetLogLevelRequest": "level=1 logger=2",
        "SetLogLevelResponse": "before=1",
    }


def _numbers(module: ModuleType) -> dict[str, str]:
    return {
        message.name: " ".join(f"{field.name}={field.number}" for field in message.fields)
        for message in module.DESCRIPTOR.message_types_by_name.values()
    }


def test_names_follow_buf_standard() -> None:
    """The rules of buf's STANDARD set that a change is most likely to break."""
    assert "package sparse_serve.v1;" in PROTO
    assert all(name.endswith("Service") for name in re.findall(r"^service (\w+)", PROTO, re.MULTILINE))
    for rpc, request, response in re.findall(r"rpc (\w+)\((\w+)\) returns \((?:stream )?(\w+)\)", PROTO):
        assert (request, response) == (f"{rpc}Request", f"{rpc}Response")
    for enum, body in re.findall(r"^enum (\w+) \{(.*?)^\}", PROTO, re.MULTILINE | re.DOTALL):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum).upper() + "_"
        names = re.findall(r"^  (\w+) = \d+;", body, re.MULTILINE)
        assert all(name.startswith(prefix) for name in names)
        assert f"{prefix}UNSPECIFIED = 0;" in body
