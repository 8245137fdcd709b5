"""cuSPARSELt's kernel without a GPU: what it asks of the library, against a library that checks and multiplies densely.

Legend: T = tokens, O = out features, I = in features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskgen.core.pattern import NMPattern
from maskgen.core.values import CODE_DTYPES
from sparse_serve.kernels import LinearSpec, cusparselt
from sparse_serve.kernels.cusparselt import BUCKETS, Algorithm
from tests.gpu.oracle import PATTERN, assert_is_product, packed_weight

SPEC = LinearSpec(64, 64, PATTERN, torch.bfloat16, "cuda")


class Library:
    """Stands in for cuSPARSELt: a blob is the dense weight, and only what the real one takes is taken."""

    def __init__(self) -> None:
        self.searched: list[int] = []
        self.used: list[Algorithm] = []
        self.refuses: set[int] = set()

    def compress(self, weight_OI: Tensor) -> Tensor:
        assert weight_OI.is_contiguous() and weight_OI.shape[0] % 16 == 0 == weight_OI.shape[1] % 16
        bits = weight_OI.view(torch.int16).view(-1, 4)
        assert ((bits != 0).sum(1) <= 2).all(), "more than two values in a group; the library takes -0 for a value"
        return weight_OI.clone()

    def mm_search(
        self, blob: Tensor, x_IT: Tensor, bias: None, alpha: None, out_dtype: None, transpose: bool
    ) -> tuple[int, int, int, int]:
        self.check(x_IT)
        assert transpose
        self.searched.append(x_IT.shape[1])
        return 100 + x_IT.shape[1], 2, 3, 999

    def multiply(
        self, blob: Tensor, x_IT: Tensor, *, bias: Tensor | None, transpose_result: bool, **algorithm: int
    ) -> Tensor:
        self.check(x_IT)
        assert transpose_result
        self.used.append(Algorithm(**algorithm))
        if algorithm["alg_id"] and x_IT.shape[1] in self.refuses:
            raise RuntimeError("CUSPARSE_STATUS_NOT_SUPPORTED")
        y_TO = x_IT.t().float() @ blob.float().t()
        return (y_TO if bias is None else y_TO + bias.float()).to(x_IT.dtype)

    def check(self, x_IT: Tensor) -> None:
        assert x_IT.shape[1] % 8 == 0 and x_IT.t().is_contiguous() and x_IT.data_ptr() % 16 == 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    fake = Library()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch, "_cslt_compress", fake.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", fake.multiply)
    monkeypatch.setattr(torch._C, "_cusparselt", fake, raising=False)
    monkeypatch.setattr(cusparselt, "_found", {})
    monkeypatch.setattr(cusparselt, "_refused", set())
    return fake


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device_type": "cpu"}, "device cpu is not an NVIDIA GPU"),
        ({"pattern": NMPattern(1, 4)}, "pattern 1:4 is not 2:4"),
        ({"dtype": torch.float32}, "dtype torch.float32 is not one of"),
        (
            {"values": "fp8_e4m3", "dtype": torch.float16},
            "values fp8_e4m3 are served with torch.bfloat16 activations only, not with torch.float16",
        ),
        ({"out_features": 24}, r"a weight [24, 64] is not of multiples of 16"),
        ({"in_features": 72}, r"a weight [64, 72] is not of multiples of 16"),
    ],
)
def test_it_says_why_it_refuses(changed: dict[str, Any], reason: str) -> None:
    assert reason in (cusparselt.unsupported_reason(LinearSpec(**{**SPEC.__dict__, **changed})) or "")


def test_it_refuses_a_torch_or_a_gpu_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert cusparselt.unsupported_reason(SPEC) == "this torch was built without cuSPARSELt"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "(7, 5) is below (8, 0)" in (cusparselt.unsupported_reason(SPEC) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    for values in ("float", *CODE_DTYPES):
        assert cusparselt.unsupported_reason(LinearSpec(64, 64, PATTERN, torch.bfloat16, "cuda", values)) is None


def test_prepare_compresses_the_weight_itself(library: Library) -> None:
    packed = packed_weight(32, 64)
    packed.values[:] = torch.where(torch.rand(packed.values.shape) < 0.1, torch.tensor(0.0), packed.values)
    tensors = cusparselt.prepare(packed)
    assert torch.equal(tensors["blob"], packed.unpack())
    assert tensors["form"].shape == (32, 0, 64) and tensors["form"].nbytes == 0


@pytest.mark.parametrize("values", list(CODE_DTYPES))
def test_8_bit_values_become_bfloat16_once(library: Library, values: str) -> None:
    torch.manual_seed(0)
    packed, bias_O = packed_weight(32, 64, values=values), torch.randn(32).bfloat16()
    packed.values.view(torch.int8)[:, ::5] = -128 if values == "fp8_e4m3" else 0  # -0, which a code may be
    tensors, x_TI = cusparselt.prepare(packed), torch.randn(9, 64).bfloat16()
    assert set(tensors) == {"blob", "form"} and torch.equal(tensors["blob"], packed.unpack().bfloat16())
    # Twice the tolerance, because the weight is rounded too.
    assert_is_product(cusparselt.linear(x_TI, tensors, bias_O), x_TI, packed, bias_O, slack=2)
    cusparselt.prepare(packed_weight(32, 64))
    assert library.searched == [*BUCKETS], "float values of the same shape are the same problem"


def test_a_shape_is_searched_once_for_each_bucket(library: Library) -> None:
    for rows in (32, 32, 48):
        cusparselt.prepare(packed_weight(rows, 64))
    assert library.searched == [*BUCKETS, *BUCKETS]


def test_another_process_does_not_search_again(
    library: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors, x_TI = cusparselt.prepare(packed_weight(16, 16)), torch.randn(64, 16).bfloat16()
    cusparselt._found.clear()
    cusparselt.prepare(packed_weight(16, 16))
    cusparselt.linear(x_TI, tensors, None)
    assert library.searched == [*BUCKETS] and library.used == [Algorithm(164, 2, 3)]
    cusparselt._found.clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    cusparselt.prepare(packed_weight(16, 16))
    assert library.searched == [*BUCKETS, *BUCKETS]


@pytest.mark.parametrize("damage", ["", "{}", '{"alg_id": "7", "split_k": 1, "split_k_mode": 1}', '{"alg_id": true}'])
def test_what_is_no_algorithm_is_searched_again(library: Library, tmp_path: Path, damage: str) -> None:
    cusparselt.prepare(packed_weight(16, 16))
    files = list((tmp_path / "cache").rglob("*.json"))
    assert len(files) == len(BUCKETS)
    for file in files:
        file.write_text(damage)
    cusparselt._found.clear()
    cusparselt.prepare(packed_weight(16, 16))
    assert library.searched == [*BUCKETS, *BUCKETS]


@pytest.mark.parametrize(
    ("tokens", "bucket"),
    [(1, 16), (16, 16), (17, 64), (64, 64), (65, 256), (1024, 1024), (1025, 4096), (4097, 8192), (9000, 8192)],
)
def test_tokens_use_what_was_found_for_their_bucket(library: Library, tokens: int, bucket: int) -> None:
    tensors = cusparselt.prepare(packed_weight(16, 16))
    cusparselt.linear(torch.randn(tokens, 16).bfloat16(), tensors, None)
    assert library.used == [Algorithm(100 + bucket, 2, 3)]


def test_a_blob_nobody_searched_for_uses_the_first_algorithm(library: Library) -> None:
    tensors = cusparselt.prepare(packed_weight(16, 16))
    cusparselt._found.clear()
    cusparselt.linear(torch.randn(1, 16).bfloat16(), tensors, None)
    assert library.used == [Algorithm(0, 1, -1)]


def test_an_algorithm_that_is_refused_is_given_up_for_that_number_of_tokens(
    library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    packed, first = packed_weight(32, 64), Algorithm()
    tensors, x_TI = cusparselt.prepare(packed), torch.randn(64, 64).bfloat16()
    library.refuses = {24}
    for tokens in (24, 64, 20, 24):
        assert_is_product(cusparselt.linear(x_TI[:tokens], tensors, None), x_TI[:tokens], packed)
    found = Algorithm(164, 2, 3)
    assert library.used == [found, first, found, first, first], "tried once, at 24; 20 are padded to 24"
    assert len(caplog.records) == 1 and "CUSPARSE_STATUS_NOT_SUPPORTED" in caplog.text


def test_what_the_first_algorithm_refuses_too_is_an_error(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> Tensor:
        raise RuntimeError("no memory for a workspace")

    tensors = cusparselt.prepare(packed_weight(32, 64))
    monkeypatch.setattr(torch, "_cslt_sparse_mm", never)
    with pytest.raises(RuntimeError, match="workspace"):
        cusparselt.linear(torch.randn(8, 64).bfloat16(), tensors, None)


def test_an_installed_library_of_another_version_is_searched_again(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    cusparselt.prepare(packed_weight(16, 16))
    cusparselt._found.clear()
    monkeypatch.setattr(cusparselt.machine, "version", lambda package: "0.8.1")
    cusparselt.prepare(packed_weight(16, 16))
    assert library.searched == [*BUCKETS, *BUCKETS]


@pytest.mark.parametrize("leading", [(0,), (1,), (7,), (8,), (9,), (2, 3), ()])
@pytest.mark.parametrize("with_bias", [True, False])
def test_any_number_of_tokens_is_padded_and_cut(library: Library, leading: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    packed, bias_O = packed_weight(32, 64), torch.randn(32).bfloat16() if with_bias else None
    x_TI = torch.randn(*leading, 64).bfloat16()
    y_TO = cusparselt.linear(x_TI, cusparselt.prepare(packed), bias_O)
    assert y_TO.shape == (*leading, 32) and y_TO.is_contiguous()
    assert_is_product(y_TO, x_TI, packed, bias_O)


def test_inputs_that_are_not_contiguous(library: Library) -> None:
    packed, x_IT = packed_weight(32, 64), torch.randn(64, 8).bfloat16()
    tensors = cusparselt.prepare(packed)
    assert torch.equal(cusparselt.linear(x_IT.T, tensors, None), cusparselt.linear(x_IT.T.contiguous(), tensors, None))
    inside_a_word = torch.randn(8 * 64 + 1).bfloat16()[1:].view(8, 64)
    expected_TO = cusparselt.linear(inside_a_word.clone(), tensors, None)
    assert torch.equal(cusparselt.linear(inside_a_word, tensors, None), expected_TO)


@pytest.mark.parametrize("tokens", [1, 8, 13])
def test_torch_s_own_shape_rules_agree(tokens: int) -> None:
    """The library's operator on the meta device, which has no numbers but all the shapes."""
    blob, form = torch.empty(32, 36, dtype=torch.bfloat16, device="meta"), torch.empty(32, 0, 64, device="meta")
    x_TI, bias_O = torch.empty(tokens, 64, dtype=torch.bfloat16, device="meta"), torch.empty(32, device="meta")
    y_TO = cusparselt.product(x_TI, blob, form, bias_O)
    assert y_TO.shape == (tokens, 32) and y_TO.dtype == torch.bfloat16 and y_TO.is_contiguous()


def test_torch_accepts_the_operator(library: Library) -> None:
    tensors = cusparselt.prepare(packed_weight(32, 64))
    arguments = (torch.randn(3, 64).bfloat16(), tensors["blob"], tensors["form"], torch.randn(32).bfloat16())
    torch.library.opcheck(cusparselt.cusparselt_linear, arguments, test_utils=("test_schema", "test_faketensor"))
