"""`sparse_serve/api/pb/` is what `proto/generate.py` makes of `proto/`, and the protocol keeps its promises."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTO = (ROOT / "proto/sparse_serve/v1/generation.proto").read_text()


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
    from sparse_serve.api.pb.v1 import generation_pb2

    numbers = {
        message.name: {field.name: field.number for field in message.fields}
        for message in generation_pb2.DESCRIPTOR.message_types_by_name.values()
    }
    prompt = {"text": 1, "token_ids": 2, "sampling": 3, "model": 4}
    quality = {"dense_perplexity": 1, "perplexity": 2, "kl_divergence": 3, "top1_agreement": 4, "windows": 5}
    quality |= {"window_tokens": 6, "texts": 7, "bad": 8, "advice": 9}
    answer = {"text": 1, "token_ids": 2, "finish_reason": 3, "usage": 4, "logprobs": 5, "prompt_logprobs": 6}
    assert numbers == {
        "TokenIds": {"ids": 1},
        "Sampling": {
            "max_tokens": 1,
            "temperature": 2,
            "top_p": 3,
            "top_k": 4,
            "min_p": 5,
            "seed": 6,
            "stop": 7,
            "stop_token_ids": 8,
            "ignore_eos": 9,
            "presence_penalty": 10,
            "frequency_penalty": 11,
            "repetition_penalty": 12,
            "logprobs": 13,
            "prompt_logprobs": 14,
        },
        "GenerateRequest": prompt,
        "GenerateStreamRequest": prompt,
        "TokenLogprob": {"token_id": 1, "logprob": 2},
        "PositionLogprobs": {"token": 1, "top": 2},
        "Usage": {"prompt_tokens": 1, "completion_tokens": 2},
        "GenerateResponse": answer,
        "GenerateStreamResponse": answer,
        "GetModelInfoRequest": {},
        "GetModelInfoResponse": {
            "model": 1,
            "max_model_len": 2,
            "vocab_size": 3,
            "dtype": 4,
            "sparse_layers": 5,
            "dense_layers": 6,
            "kernels": 7,
            "sparse_weight_bytes": 8,
            "dense_equivalent_bytes": 9,
            "models": 10,
            "quality": 11,
        },
        "Quality": quality,
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
