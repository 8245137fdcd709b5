"""`deploy/ray`: two replicas under Ray Serve LLM, one of which is killed under load, and what the manifest says.

The first takes Ray, which is not installed with this project: `pip install --no-deps -r deploy/ray/requirements.txt`.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.architecture.source import ROOT
from tests.deploy.hosts import free_ports
from tests.deploy.streams import Streams
from tests.vllm.serving import PROMPT, make_checkpoint, until

FOLDER = ROOT / "deploy/ray"
START_S = 600.0
EACH, TOKENS = 32, 64
SERVE = """
import sys, time, yaml, ray
from ray import serve
from ray.serve.llm import build_openai_app
(application,) = yaml.safe_load(open(sys.argv[1]))["applications"]
ray.init(num_cpus=6, include_dashboard=False, object_store_memory=200_000_000, _temp_dir=sys.argv[3])
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(build_openai_app(application["args"]), name="llm", route_prefix=application["route_prefix"])
print("serving", flush=True)
time.sleep(3600)
"""


def application(file: str) -> dict[str, Any]:
    config = yaml.safe_load((FOLDER / file).read_text("utf-8"))
    if file == "rayservice.yaml":
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    (found,) = config["applications"]
    return dict(found)


def engine_arguments() -> set[str]:
    """Fields of vLLM's engine arguments, read in its source: importing it changes the process."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    module = ast.parse(Path(spec.origin).with_name("engine").joinpath("arg_utils.py").read_text("utf-8"))
    classes = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name.endswith("EngineArgs")]
    fields = [node for each in classes for node in each.body if isinstance(node, ast.AnnAssign)]
    return {field.target.id for field in fields if isinstance(field.target, ast.Name)}


@pytest.mark.parametrize("file", ["serve.yaml", "rayservice.yaml"])
def test_what_is_given_to_vllm_exists(file: str) -> None:
    shown = application(file)
    assert shown["import_path"] == "ray.serve.llm:build_openai_app"
    (llm,) = shown["args"]["llm_configs"]
    assert llm["engine_kwargs"].keys() <= engine_arguments()
    assert llm["deployment_config"]["num_replicas"] == 2


def test_the_manifest_is_about_the_version_that_was_tried() -> None:
    manifest = yaml.safe_load((FOLDER / "rayservice.yaml").read_text("utf-8"))
    (pinned,) = re.findall(r"^ray==(.*)$", (FOLDER / "requirements.txt").read_text(), re.MULTILINE)
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == pinned
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for each in pod["containers"] for mount in each["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        (llm,) = application("rayservice.yaml")["args"]["llm_configs"]
        assert llm["model_loading_config"]["model_source"].startswith(mounts["models"])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a tiny sparse checkpoint under Ray, and the process that runs Ray."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install --no-deps -r deploy/ray/requirements.txt")
    shown = application("serve.yaml")
    (llm,) = shown["args"]["llm_configs"]
    llm["model_loading_config"]["model_source"] = str(make_checkpoint(tmp_path))
    llm["engine_kwargs"]["dtype"] = "float32"  # as stored, and as transformers computes; vLLM by itself takes 16 bits
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"applications": [shown]}))
    (port,) = free_ports(1)
    folder = tempfile.mkdtemp(prefix="ray")  # not below tmp_path, as paths of sockets are short
    command = [sys.executable, "-c", SERVE, str(tmp_path / "serve.yaml"), str(port), folder]
    environ = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    family = psutil.Process(process.pid)
    try:
        until(lambda: b"serving" in (tmp_path / "log").read_bytes() or process.poll() is not None, START_S)
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}", family
    finally:
        children = family.children(recursive=True)
        process.send_signal(signal.SIGINT)
        psutil.wait_procs([family, *children], timeout=30)
        for child in (family, *children):
            if child.is_running():
                child.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def replicas(ray: psutil.Process) -> list[psutil.Process]:
    """Processes that hold the model, oldest first."""
    found = [child for child in ray.children(recursive=True) if is_replica(child)]
    return sorted(found, key=psutil.Process.create_time)


def is_replica(process: psutil.Process) -> bool:
    try:
        return "ServeReplica:llm:LLMServer" in "".join(process.cmdline()[:1])
    except psutil.Error:
        return False


def engine_count(ray: psutil.Process) -> int:
    """Replicas whose engine runs."""
    return sum(any("EngineCore" in " ".join(child.cmdline()) for child in each.children()) for each in replicas(ray))


@pytest.mark.timeout(1800)
def test_when_a_replica_is_killed_only_its_own_streams_are_lost(
    served: tuple[str, psutil.Process], tmp_path: Path
) -> None:
    address, ray = served
    first, _ = replicas(ray)
    with Streams(address, "", [TOKENS] * EACH) as streams:
        streams.wait_for_answers(START_S)
        first.kill()
        killed_s = time.monotonic()
        streams.wait_for_answers(START_S)
        streams.active = 2
        until(lambda: len(replicas(ray)) == 2 and engine_count(ray) == 2, START_S)
        streams.active = 0
        streams.wait_for_answers(START_S)
    lost = [answer for answer in streams.answers if answer.lost]
    assert len(lost) <= EACH and all(answer.began_s < killed_s + 30 for answer in lost), lost
    assert not any("every attempt" in answer.lost for answer in lost)
    assert {answer.text for answer in streams.answers if not answer.lost} == {expected(tmp_path / "sparse")}


def expected(sparse: Path) -> str:
    """What transformers generates of the decompressed checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import maskgen.hf.loader

    maskgen.hf.loader.register()
    model, tokenizer = (kind.from_pretrained(sparse) for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    ids = model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    text: str = tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    return text.rstrip("\ufffd")  # half a character, which a stream holds back
