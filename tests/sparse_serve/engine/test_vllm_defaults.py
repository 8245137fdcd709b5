"""Defaults for vLLM, and flags it would take in vain."""

import errno
import json
import os
from argparse import Namespace
from pathlib import Path

import huggingface_hub
import pytest

from maskgen.core.errors import FormatError, StorageError
from maskgen.core.failures import explained
from sparse_serve.engine import vllm_defaults
from sparse_serve.runtime.conversion import Conversion
from sparse_serve.runtime.errors import SettingsError

NONE_GIVEN = Namespace(**dict.fromkeys(vllm_defaults._REFUSED))


@pytest.mark.parametrize("flag", vllm_defaults._REFUSED)
def test_a_flag_that_cannot_be_honoured_is_an_error_with_the_way_out(flag: str) -> None:
    given = Namespace(**vars(NONE_GIVEN) | {flag: "given"})
    with pytest.raises(
        SettingsError, match=f"--{flag.replace('_', '-')} cannot be used here: {vllm_defaults._REFUSED[flag][:10]}"
    ):
        vllm_defaults.check_flags(given, NONE_GIVEN, {})
    vllm_defaults.check_flags(NONE_GIVEN, NONE_GIVEN, {})


def test_a_key_in_the_environment_is_no_better_than_one_in_a_flag() -> None:
    with pytest.raises(SettingsError, match="VLLM_API_KEY"):
        vllm_defaults.check_flags(NONE_GIVEN, NONE_GIVEN, {"VLLM_API_KEY": "k"})


def test_spans_need_the_statistics_that_they_are_made_of() -> None:
    both = {"otlp_traces_endpoint": "http://127.0.0.1:4317", "disable_log_stats": True}
    with pytest.raises(SettingsError, match="--otlp-traces-endpoint and --disable-log-stats"):
        vllm_defaults.check_tracing(Namespace(**both))
    for name in both:
        vllm_defaults.check_tracing(Namespace(**both | {name: None}))


def test_what_the_user_says_wins() -> None:
    said = {
        "VLLM_LOGGING_STREAM": "ext://sys.stdout",
        "VLLM_MAX_N_SEQUENCES": "1",
        "VLLM_CPU_KVCACHE_SPACE": "9",
        "TORCHDYNAMO_DISABLE": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    environ = dict(said)
    vllm_defaults.set_common(environ)
    vllm_defaults.set_cpu(environ, ranks=1, eager=True, cores=[0, 1])
    vllm_defaults.set_cpu(environ, ranks=2, eager=True, cores=[0, 1])
    assert environ == said


def test_one_rank_stays_in_the_engine_process_and_several_share_the_cores() -> None:
    one: dict[str, str] = {}
    vllm_defaults.set_cpu(one, ranks=1, eager=False, cores=[0, 1])
    assert one.keys() == {"VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING"}
    assert one["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    two: dict[str, str] = {}
    vllm_defaults.set_cpu(two, ranks=2, eager=True, cores=[0, 2, 3, 5])
    assert two["VLLM_CPU_OMP_THREADS_BIND"] == "0,2|3,5"
    assert two["TORCHDYNAMO_DISABLE"] == "1"
    too_many: dict[str, str] = {}
    vllm_defaults.set_cpu(too_many, ranks=3, eager=False, cores=[0, 1])
    assert too_many.keys() == {"VLLM_CPU_KVCACHE_SPACE"}
    by_flag: dict[str, str] = {}
    vllm_defaults.set_cpu(by_flag, ranks=3, eager=False, cores=[0, 1], kv_cache_bytes=1 << 20)
    assert not by_flag, "the variable would overrule the flag"


@pytest.mark.parametrize(("available_gib", "cache_gib"), [(0.5, 1), (4, 1), (12, 3), (500, 4)])
def test_the_kv_cache_takes_a_quarter_within_limits(available_gib: float, cache_gib: int) -> None:
    assert vllm_defaults._kv_cache_gib(int(available_gib * 2**30)) == cache_gib


def test_models_are_directories_or_names(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(SettingsError, match=r"model has no config\.json"):
        vllm_defaults.check_model(str(tmp_path / "model"))
    (tmp_path / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(FormatError, match="model: an adapter of 'owner/base', not a model; merge it into that model"):
        vllm_defaults.check_model(str(tmp_path / "model"))
    (tmp_path / "model" / "config.json").write_text("{}")
    vllm_defaults.check_model(str(tmp_path / "model"))
    vllm_defaults.check_model("owner/model")
    for wrong in ("model", "./model", "/a/b", "~/model", "a/b/c"):
        with pytest.raises(SettingsError, match="is not a directory"):
            vllm_defaults.check_model(wrong)


def test_only_one_pipeline_stage_on_a_cpu() -> None:
    vllm_defaults.check_cpu(Namespace(pipeline_parallel_size=1, enforce_eager=False), None)
    with pytest.raises(SettingsError, match=r"--pipeline-parallel-size 2: .*--tensor-parallel-size"):
        vllm_defaults.check_cpu(Namespace(pipeline_parallel_size=2, enforce_eager=True), None)


def test_a_model_is_not_compiled_where_nothing_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = Namespace(pipeline_parallel_size=1, enforce_eager=False, enable_lora=None)
    here = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    (tmp_path / "file").touch()
    monkeypatch.setattr(vllm_defaults, "has_cpp_compiler", lambda: True)
    assert vllm_defaults.no_compiling(args, here) is None
    reasons = [
        vllm_defaults.no_compiling(args, here | {"TORCHDYNAMO_DISABLE": "1"}),
        vllm_defaults.no_compiling(args, {"XDG_CACHE_HOME": str(tmp_path / "file")}),
        vllm_defaults.no_compiling(Namespace(enable_lora=True), here),
    ]
    monkeypatch.setattr(vllm_defaults, "has_cpp_compiler", lambda: False)
    reasons.append(vllm_defaults.no_compiling(args, here))
    for reason, part in zip(reasons, ("DYNAMO", "file/vllm, where", "adapters", r"no C\+\+ compiler"), strict=True):
        with pytest.raises(SettingsError, match=f"--no-enforce-eager: nothing can be compiled here: .*{part}"):
            vllm_defaults.check_cpu(args, reason)
        vllm_defaults.check_cpu(Namespace(pipeline_parallel_size=1, enforce_eager=True), reason)


def hub(cache: Path, files: dict[str, str], revision: str = "main") -> Namespace:
    """Arguments for `owner/model`, which is in the hub's cache with these files."""
    folder = cache / "models--owner--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text("a" * 40)
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    none = dict.fromkeys(("model_tag", "revision", "served_model_name"))
    return Namespace(model="owner/model", download_dir=str(cache), trust_remote_code=False, load_format="auto", **none)


SPARSE = json.dumps({"quantization_config": {"quant_method": "sparse_nm"}})


def test_a_sparse_model_of_the_hub_becomes_a_directory_under_its_own_name(tmp_path: Path) -> None:
    args = hub(tmp_path, {"config.json": SPARSE}, "v2")
    args.revision = "v2"
    vllm_defaults.resolve_hub_model(args, {})
    assert json.loads((Path(args.model) / "config.json").read_text()) == json.loads(SPARSE)
    assert (args.model_tag, args.served_model_name) == (args.model, ["owner/model"])
    other = Namespace(**vars(args) | {"model": "owner/model", "served_model_name": ["mine"]})
    vllm_defaults.resolve_hub_model(other, {})
    assert (other.model, other.served_model_name) == (args.model, ["mine"])


def test_dense_models_of_the_hub_and_directories_are_left_alone(tmp_path: Path) -> None:
    args = hub(tmp_path, {"config.json": "{}"})
    vllm_defaults.resolve_hub_model(args, {})
    assert (args.model, args.served_model_name) == ("owner/model", None)
    sparse = hub(tmp_path / "other", {"config.json": SPARSE})
    vllm_defaults.resolve_hub_model(sparse, {"VLLM_USE_MODELSCOPE": "True"})
    assert sparse.model == "owner/model"
    (tmp_path / "config.json").write_text(SPARSE)
    local = Namespace(model=str(tmp_path))
    vllm_defaults.resolve_hub_model(local, {})
    assert local == Namespace(model=str(tmp_path))


BITMASK = json.dumps({"quantization_config": {"quant_method": "compressed-tensors", "format": "sparse-24-bitmask"}})


def test_of_the_hub_only_what_is_to_be_converted_becomes_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only the shards are downloaded that are read for it."""
    asked: list[list[str]] = []
    original = huggingface_hub.snapshot_download

    def snapshot_download(name: str, allow_patterns: list[str], **place: object) -> str:
        asked.append(allow_patterns)
        return str(original(name, allow_patterns=allow_patterns, **place))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    index = json.dumps({"weight_map": {"a": "two.safetensors", "b": "one.safetensors", "c": "../x.safetensors"}})
    files = {"config.json": BITMASK, "model.safetensors.index.json": index}
    foreign = hub(tmp_path / "foreign", files)
    vllm_defaults.resolve_hub_model(foreign, {})
    assert foreign.model == "owner/model" and not asked, "nothing is to be converted"
    vllm_defaults.resolve_hub_model(foreign, {}, Conversion())
    assert Path(foreign.model).is_dir() and foreign.served_model_name == ["owner/model"]
    assert [name for name in asked[0] if name.endswith("safetensors")] == ["one.safetensors", "two.safetensors"]
    dense = hub(tmp_path / "dense", {"config.json": "{}"})
    vllm_defaults.resolve_hub_model(dense, {}, Conversion())
    assert (dense.model, dense.served_model_name) == ("owner/model", None)
    assert "model.safetensors" in asked[1]
    gptq = hub(tmp_path / "gptq", {"config.json": json.dumps({"quantization_config": {"quant_method": "gptq"}})})
    vllm_defaults.resolve_hub_model(gptq, {}, Conversion())
    dummy = Namespace(**vars(hub(tmp_path / "dummy", {"config.json": "{}"})) | {"load_format": "dummy"})
    vllm_defaults.resolve_hub_model(dummy, {}, Conversion())
    assert (gptq.model, dummy.model, len(asked)) == ("owner/model", "owner/model", 2)


def test_code_is_downloaded_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot_download(name: str, allow_patterns: list[str], **place: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    args = hub(tmp_path, {"config.json": SPARSE})
    vllm_defaults.resolve_hub_model(Namespace(**vars(args)), {})
    vllm_defaults.resolve_hub_model(Namespace(**vars(args) | {"trust_remote_code": True}), {})
    assert ["*.py" in patterns for patterns in asked] == [False, True]
    assert all("*.safetensors" in patterns for patterns in asked)


def test_a_disk_that_is_full_of_a_download_is_no_missing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/blobs/x.incomplete")

    args = hub(tmp_path, {"config.json": SPARSE})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fill)
    with pytest.raises(StorageError, match=r"/cache/blobs/x\.incomplete: No space left on device"), explained():
        vllm_defaults.resolve_hub_model(args, {})


def test_a_model_that_the_hub_does_not_give_is_one_clear_error(tmp_path: Path) -> None:
    args = hub(tmp_path, {"config.json": SPARSE})
    args.revision = "gone"
    with pytest.raises(
        SettingsError, match="owner/model is neither a directory nor to be had from the Hugging Face hub: "
    ):
        vllm_defaults.resolve_hub_model(args, {})
