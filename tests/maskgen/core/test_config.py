"""The manifest: a round trip, and one error for everything this release does not know exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from maskgen.core.config import SparseConfig
from maskgen.core.correction import LowRankCorrection, PooledCorrection
from maskgen.core.errors import FormatError, PatternError
from maskgen.core.pattern import NMPattern

DIGEST = "sha256:" + "0123456789abcdef" * 4
MANIFEST: dict[str, Any] = {
    "quant_method": "sparse_nm",
    "format_version": 2,
    "pattern": "2:4",
    "values": "float",
    "correction": None,
    "targets": ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"],
    "ignored": ["lm_head"],
    "mask_digest": DIGEST,
    "recipe_digest": DIGEST,
    "base_model": {"name": "tiny", "digest": DIGEST},
}


def test_round_trip() -> None:
    config = SparseConfig.from_dict(MANIFEST)
    assert config.to_dict() == MANIFEST
    assert config.pattern == NMPattern(2, 4)
    assert (config.base_model, config.base_digest) == ("tiny", DIGEST)
    assert SparseConfig.from_dict(config.to_dict()) == config


def test_nothing_need_be_ignored() -> None:
    assert SparseConfig.from_dict({**MANIFEST, "ignored": []}).ignored == ()


@pytest.mark.parametrize("name", ["model", "m.layers.10.up_proj", "_a.B9", "x" * 64, ".".join("abcdefghijklmnop")])
def test_module_names(name: str) -> None:
    assert SparseConfig.from_dict({**MANIFEST, "targets": [name]}).targets == (name,)


@pytest.mark.parametrize(
    "name",
    ["", ".", "a.", ".a", "a..b", "a/b", "../a", "a\\b", "a b", "a\n", "a\x00", "a-b", "a:b", "a*", "é", "x" * 65,
     ".".join("abcdefghijklmnopq"), None, 7, True, ["a"], {"a": 1}, "${HOME}", "~root", "٣"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["targets", "ignored"])
def test_names_that_are_not_modules(key: str, name: Any) -> None:
    with pytest.raises(FormatError, match=f"quantization_config: {key} holds .* not a dotted module name"):
        SparseConfig.from_dict({**MANIFEST, key: [name]})


@pytest.mark.parametrize("key", sorted(MANIFEST))
def test_every_key_is_needed(key: str) -> None:
    with pytest.raises(FormatError, match=key):
        SparseConfig.from_dict({name: value for name, value in MANIFEST.items() if name != key})


@pytest.mark.parametrize("key", ["extra", "Pattern", "", "auto_map", "kv_cache_scheme"])
def test_unknown_keys(key: str) -> None:
    with pytest.raises(FormatError, match=rf"quantization_config: unknown keys \['{key}'\], missing keys \[\]"):
        SparseConfig.from_dict({**MANIFEST, key: 1})
    with pytest.raises(FormatError, match=rf"base_model: unknown keys \['{key}'\], missing keys \[\]"):
        SparseConfig.from_dict({**MANIFEST, "base_model": {"name": "a", "digest": DIGEST, key: 1}})


@pytest.mark.parametrize("version", [0, 1, 5, -1, 2.0, 4.0, True, "1", None, [1], 10**30, float("nan"), "9" * 10_000])
def test_unknown_versions(version: Any) -> None:
    with pytest.raises(FormatError, match=r"format_version .*, this release reads 2 to 4") as caught:
        SparseConfig.from_dict({**MANIFEST, "format_version": version})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("values", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("pool", ["fixed", "trained"])
def test_values_and_corrections_round_trip(values: str, pool: str) -> None:
    manifest = {**MANIFEST, "values": values, "correction": {"kind": "pooled", "segment": 16, "pool": pool}}
    config = SparseConfig.from_dict(manifest)
    assert (config.values, config.correction) == (values, PooledCorrection(16, pool))
    assert config.to_dict() == manifest


@pytest.mark.parametrize("values", ["float", "int8"])
def test_low_rank_corrections_round_trip(values: str) -> None:
    manifest = {**MANIFEST, "values": values, "correction": {"kind": "lowrank", "rank": 16}}
    config = SparseConfig.from_dict(manifest)
    assert config.correction == LowRankCorrection(16) and config.to_dict() == manifest


@pytest.mark.parametrize("values", ["Float", "int3", "fp8_e5m2", "", None, 8, True, ["int8"], {"int8": 1}, "x" * 10**6])
def test_values_of_another_kind(values: Any) -> None:
    expected = r"values .*, expected one of \['float', 'int8', 'fp8_e4m3', 'int4'\]"
    with pytest.raises(FormatError, match=expected) as caught:
        SparseConfig.from_dict({**MANIFEST, "values": values})
    assert len(str(caught.value)) < 300


CORRECTION = {"kind": "pooled", "segment": 16, "pool": "fixed"}


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        ("pooled", "correction 'pooled', expected an object or null"),
        ([CORRECTION], "correction .*, expected an object or null"),
        (False, "correction False, expected an object or null"),
        ({}, r"correction: unknown keys \[\], missing keys"),
        ({**CORRECTION, "rank": 4}, r"correction: unknown keys \['rank'\]"),
        ({**CORRECTION, "kind": "lora"}, "correction.kind 'lora', expected 'pooled' or 'lowrank'"),
        ({**CORRECTION, "kind": ["lowrank"]}, r"correction.kind \['lowrank'\], expected 'pooled' or 'lowrank'"),
        ({**CORRECTION, "kind": "lowrank"}, r"correction: unknown keys \['pool', 'segment'\], missing keys \['rank'\]"),
        ({"kind": "lowrank"}, r"correction: unknown keys \[\], missing keys \['rank'\]; expected exactly"),
        ({"kind": "lowrank", "rank": 4, "alpha": 1}, r"correction: unknown keys \['alpha'\]"),
        *(
            ({"kind": "lowrank", "rank": rank}, "correction.rank .*, expected a whole number from 1 to 1048576")
            for rank in (0, -16, 16.0, True, "16", None, 2**20 + 1, 10**100, [16])
        ),
        ({**CORRECTION, "pool": "learned"}, "correction.pool 'learned', expected 'fixed' or 'trained'"),
        ({**CORRECTION, "pool": ["fixed"]}, "correction.pool"),
        ({**CORRECTION, "pool": None}, "correction.pool"),
        *(
            ({**CORRECTION, "segment": segment}, "correction.segment .*, expected a whole number from 1 to 1048576")
            for segment in (0, -16, 16.0, True, "16", None, 2**20 + 1, 10**100, [16])
        ),
    ],
)
def test_corrections_of_another_kind(correction: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        SparseConfig.from_dict({**MANIFEST, "correction": correction})
    assert len(str(caught.value)) < 400


def test_shapes_of_a_correction() -> None:
    assert PooledCorrection(16, "fixed").shapes(8, 64, "up") == ([8, 4], None)
    assert PooledCorrection(16, "trained").shapes(8, 64, "up") == ([8, 4], [4, 64])
    with pytest.raises(FormatError, match="up: 64 input features are no multiple of the correction's segment of 48"):
        PooledCorrection(48, "fixed").shapes(8, 64, "up")
    assert LowRankCorrection(8).shapes(8, 64, "up") == ([8, 8], [8, 64])
    assert LowRankCorrection(8).shapes(64, 8, "up") == ([64, 8], [8, 8])
    for shape in ((8, 64), (64, 8)):
        with pytest.raises(FormatError, match=r"up: the correction's rank of 9 is too large .*; expected at most 8"):
            LowRankCorrection(9).shapes(*shape, "up")


@pytest.mark.parametrize("method", ["Sparse_nm", "sparse-24", "", None, 1, ["sparse_nm"]])
def test_another_method(method: Any) -> None:
    with pytest.raises(FormatError, match="quant_method"):
        SparseConfig.from_dict({**MANIFEST, "quant_method": method})


@pytest.mark.parametrize(
    "pattern", ["2:4; import os", "4:2", "2:4\n", 24, None, [2, 4], {"n": 2, "m": 4}, "2:" * 10**6]
)
def test_patterns(pattern: Any) -> None:
    with pytest.raises(PatternError, match="pattern") as caught:
        SparseConfig.from_dict({**MANIFEST, "pattern": pattern})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("key", ["mask_digest", "recipe_digest", "base_digest"])
@pytest.mark.parametrize(
    "digest",
    ["", "sha256:", DIGEST[:-1], DIGEST + "0", DIGEST + "\n", DIGEST.upper(), "md5:" + "0" * 32, None, 7, [DIGEST]],
)
def test_digests(key: str, digest: Any) -> None:
    changes = {"base_model": {"name": "a", "digest": digest}} if key == "base_digest" else {key: digest}
    with pytest.raises(FormatError, match=f"{key}: .* is not a digest"):
        SparseConfig.from_dict({**MANIFEST, **changes})


@pytest.mark.parametrize("name", ["", "x" * 257, None, 3, "a\nb", "a\x1b[31m", "a\ud800", "a\u202eb", ["a"]])
def test_labels(name: Any) -> None:
    with pytest.raises(FormatError, match=r"base_model\.name .*, expected 1 to 256 printable characters"):
        SparseConfig.from_dict({**MANIFEST, "base_model": {"name": name, "digest": DIGEST}})


@pytest.mark.parametrize("value", [None, [], "sparse_nm", 1, True])
def test_not_an_object(value: Any) -> None:
    with pytest.raises(FormatError, match=r"quantization_config: a .*, expected an object"):
        SparseConfig.from_dict(value)
    with pytest.raises(FormatError, match=r"base_model .*, expected an object"):
        SparseConfig.from_dict({**MANIFEST, "base_model": value})


@pytest.mark.parametrize("value", [None, "model.layers.0.mlp.up_proj", {"a": 1}, 3])
@pytest.mark.parametrize("key", ["targets", "ignored"])
def test_lists_are_lists(key: str, value: Any) -> None:
    with pytest.raises(FormatError, match=f"{key} is a .*, expected a list"):
        SparseConfig.from_dict({**MANIFEST, key: value})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda one: one.update(targets=[]), "targets holds 0 names"),
        (lambda one: one.update(targets=["a", "a"]), "targets names a module twice"),
        (lambda one: one.update(ignored=["b", "b"]), "ignored names a module twice"),
        (lambda one: one.update(targets=["a", "b"], ignored=["b"]), "'b' is both in targets and in ignored"),
    ],
)
def test_each_module_once(change: Callable[[dict[str, Any]], None], message: str) -> None:
    manifest = dict(MANIFEST)
    change(manifest)
    with pytest.raises(FormatError, match=message):
        SparseConfig.from_dict(manifest)
