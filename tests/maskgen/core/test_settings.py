"""The record of what a checkpoint was written with besides its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskgen.core.checkpoint import SparseCheckpoint
from maskgen.core.companions import SETTINGS_FILE
from maskgen.core.digest import digest_file
from maskgen.core.errors import FormatError
from maskgen.core.pattern import NMPattern
from maskgen.core.settings import (
    SettingsRecord,
    _differences,
    changed_companions,
    check_recorded_config,
    check_settings,
)
from maskgen.export.convert import convert
from tests.directories import COMPANIONS, dense_dir, sparse_dir

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    return sparse_dir(tmp_path / "sparse", rope_parameters=rope, ids=[1, 2], use_cache=True)


def edit(file: Path, change: Edit) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value, sort_keys=True))


def test_a_sparse_checkpoint_has_it_and_a_dense_model_has_none(sparse: Path) -> None:
    record = check_settings(sparse)
    assert record is not None and record == SettingsRecord.read(sparse)
    assert record.files == {name: digest_file(sparse / name) for name in COMPANIONS}
    config = json.loads((sparse / "config.json").read_text())
    assert set(config) - set(record.config) == {"quantization_config", "transformers_weights"}
    assert all(config[key] == value for key, value in record.config.items())
    assert not (dense_dir(sparse.parent / "dense") / SETTINGS_FILE).exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.update(rms_norm_eps=1e5), "rms_norm_eps is 100000.0, and was 1e-06"),
        (lambda config: config["rope_parameters"].update(rope_theta=5e5), "rope_parameters.rope_theta is 500000.0"),
        (lambda config: config.pop("rms_norm_eps"), "rms_norm_eps is absent, and was 1e-06"),
        (lambda config: config.update(head_dim=16), "head_dim is 16, and was absent"),
        (lambda config: config.update(use_cache=1), "use_cache is 1, and was True"),
        (lambda config: config.update(rope_parameters=None), "rope_parameters is None, and was {'rope_theta'"),
        (lambda config: config["ids"].__setitem__(1, 3), "ids[1] is 3, and was 2"),
        (lambda config: config["ids"].append(3), "ids is [1, 2, 3], and was [1, 2]"),
    ],
)
def test_a_changed_number_is_named(sparse: Path, change: Edit, said: str) -> None:
    edit(sparse / "config.json", change)
    SparseCheckpoint.open(sparse).verify_digests()
    for check in (check_settings, check_recorded_config):
        with pytest.raises(FormatError, match=re.escape(f"{sparse / 'config.json'}: {said}")):
            check(sparse)


def test_what_decides_nothing_may_change(sparse: Path) -> None:
    edit(sparse / "config.json", lambda config: config.update(transformers_version="9", _name_or_path="x"))
    (sparse / "notes.txt").write_text("mine")
    (sparse / "maskgen_quality.json").write_text("{}")
    assert check_settings(sparse) is not None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "tokenizer.json").write_text("{} "), "tokenizer.json: changed since"),
        (lambda path: (path / "merges.txt").unlink(), "merges.txt: gone since"),
        (lambda path: (path / "tokenizer_config.json").write_text("{}"), "tokenizer_config.json: not there when"),
    ],
)
def test_a_changed_file_is_named(sparse: Path, damage: Callable[[Path], object], said: str) -> None:
    assert changed_companions(sparse) == ()
    damage(sparse)
    check_recorded_config(sparse)
    assert len(changed_companions(sparse)) == 1 and said in changed_companions(sparse)[0]
    with pytest.raises(FormatError, match=f"{said}.*maskgen convert {sparse} --out NEW"):
        check_settings(sparse)


def test_a_change_that_is_meant_is_written_anew(sparse: Path, tmp_path: Path) -> None:
    """As the error advises; and what is converted does not need a record."""
    edit(sparse / "config.json", lambda config: config.update(rms_norm_eps=1e-5))
    convert(sparse, tmp_path / "new", NMPattern(2, 4))
    record = check_settings(tmp_path / "new")
    assert record is not None and record.config["rms_norm_eps"] == 1e-5
    (sparse / SETTINGS_FILE).unlink()
    convert(sparse, tmp_path / "again", NMPattern(2, 4))
    assert check_settings(tmp_path / "again") == record


def test_without_a_record_nothing_is_compared(sparse: Path) -> None:
    (sparse / SETTINGS_FILE).unlink()
    edit(sparse / "config.json", lambda config: config.update(rms_norm_eps=1.0))
    assert check_settings(sparse) is None and changed_companions(sparse) == ()
    check_recorded_config(sparse)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record.update(format_version=2), "format_version 2, this release reads 1; upgrade"),
        (lambda record: record.update(format_version=True), "format_version True"),
        (lambda record: record.update(more=1), r"unknown keys \['more'\]"),
        (lambda record: record.pop("files"), r"missing keys \['files'\]"),
        (lambda record: record.update(config=[]), "config is a list, expected an object"),
        (lambda record: record["files"].update(a="sha256:1"), "'a': 'sha256:1' is not a digest"),
    ],
)
def test_a_damaged_record_is_refused(sparse: Path, change: Edit, said: str) -> None:
    edit(sparse / SETTINGS_FILE, change)
    for check in (check_settings, check_recorded_config, changed_companions):
        with pytest.raises(FormatError, match=said):
            check(sparse)


def test_a_record_opens_no_file_that_it_names(sparse: Path) -> None:
    """What it names is compared with what is there, and looked for nowhere else."""
    outside = sparse.parent / "outside.json"
    outside.write_text("{}")
    edit(sparse / SETTINGS_FILE, lambda record: record["files"].update({"../outside.json": digest_file(outside)}))
    with pytest.raises(FormatError, match=r"outside\.json: gone since"):
        check_settings(sparse)
    (sparse / SETTINGS_FILE).unlink()
    (sparse / SETTINGS_FILE).symlink_to("nowhere")
    with pytest.raises(FormatError, match="no such file"):
        check_settings(sparse)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | st.text("ab"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_values_differ_exactly_if_their_json_does(then: Any, now: Any) -> None:
    def exact(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: exact(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [exact(inner) for inner in value]
        return (isinstance(value, bool), value)

    assert bool(list(_differences(then, now, ""))) == (exact(then) != exact(now))
