"""The table of what vLLM serves: read strictly, asked by architecture."""

from __future__ import annotations

from typing import Any

import pytest

from maskgen.core.errors import FormatError, ModelError
from maskgen.hf import servable
from maskgen.hf.servable import Served, Table

ENTRY: dict[str, Any] = {
    "fused": {"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
    "sparse": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
    "dense": ["mlp.experts.*.w1", "mlp.gate"],
}
TABLE = {"vllm": "1.2.3", "architectures": {"Known": ENTRY, "Unknown": None}}


def test_what_is_known_of_an_architecture() -> None:
    table = Table.from_dict(TABLE)
    served = Served(frozenset(ENTRY["sparse"]), (("q_proj", "k_proj", "v_proj"),))
    assert table.find(["Absent", "Known"]) == table.find(["Known"]) == served
    assert table.find(["Unknown"]) is None and table.find(["Absent"]) is None
    table.check(["Absent", "Unknown"])
    with pytest.raises(ModelError, match=r"Absent or Missing: vLLM 1\.2\.3 has no such model.*`allow_unserved`"):
        table.check(["Absent", "Missing"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected an object with the keys vllm and architectures"),
        ({**TABLE, "more": 1}, "expected an object with the keys"),
        ({**TABLE, "vllm": 1}, "expected an object with the keys"),
        ({**TABLE, "architectures": {}}, "expected an object that is not empty"),
        ({**TABLE, "architectures": {"Known": []}}, "Known: expected null or an object with fused, sparse and dense"),
        ({**TABLE, "architectures": {"Known": {**ENTRY, "extra": []}}}, "Known: expected null or an object"),
        ({**TABLE, "architectures": {"Known": {**ENTRY, "fused": []}}}, r"Known: fused \[\], expected an object"),
        ({**TABLE, "architectures": {"Known": {**ENTRY, "fused": {"qkv": "q"}}}}, "Known: qkv 'q', expected a list"),
        ({**TABLE, "architectures": {"Known": {**ENTRY, "sparse": [1]}}}, "Known: sparse .* expected a list of names"),
        (
            {**TABLE, "architectures": {"Known": {**ENTRY, "dense": ["attn.q_proj"]}}},
            "'attn.q_proj' is both sparse and",
        ),
    ],
)
def test_anything_else_is_an_error(value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Table.from_dict(value)


def test_the_shipped_table_knows_llama() -> None:
    llama = servable.table().find(["LlamaForCausalLM"])
    assert llama is not None and len(llama.sparse) == 7
    assert {frozenset(group) for group in llama.groups} == {frozenset(group) for group in servable.USUAL_GROUPS}


def test_architectures_of_a_config() -> None:
    assert servable.architectures({"architectures": ["A", 1, "B"]}) == ["A", "B"]
    assert servable.architectures({}) == servable.architectures({"architectures": "A"}) == []
