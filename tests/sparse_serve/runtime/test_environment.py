"""Variables that starting an engine sets are put back, and no others are touched."""

import os

import pytest

from sparse_serve.engine.vllm_defaults import set_common, set_cpu
from sparse_serve.runtime import environment, processes


def test_all_that_a_start_sets_is_put_back_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("VLLM_", "TORCHDYNAMO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    before = dict(os.environ)
    with pytest.raises(KeyError), environment.restored():
        processes.lead()
        set_common(os.environ)
        set_cpu(os.environ, ranks=1, eager=True, cores=[0])
        set_cpu(os.environ, ranks=2, eager=True, cores=[0, 1])
        environment.set_verified_files("digest")
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
        assert len(os.environ.keys() - before.keys()) == 7
        raise KeyError
    assert dict(os.environ) == before


def test_what_others_set_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOMEBODY_ELSES", raising=False)
    with environment.restored():
        monkeypatch.setenv("SOMEBODY_ELSES", "1")
    assert os.environ["SOMEBODY_ELSES"] == "1"
