"""Installs a wheel into a new environment outside the tree, and does there what a user does: `make wheel`.

    python -m tests.release.wheel install WHEEL FOLDER     # the lock of CPU machines, then the wheel
    python -m tests.release.wheel check FOLDER             # prune, inspect, load, serve by kernel `cpu`, ask over gRPC

Nothing there sees this tree: the commands run in another folder, with a cache and a configuration of their own. The
model is made here, dense and random, with transformers and a tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests import models
from tests.architecture.source import ROOT
from tests.vllm.serving import SHAPE

LOCK = ROOT / "deploy/locks/cpu.txt"
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision", "triton"}
"""What deploy/locks/README.md says is missing on purpose."""

START_S = 900.0
"""The model is compiled in it, once, which takes minutes on a machine with other work."""

COMMAND_S = 600.0
KERNEL = json.dumps({"sparse_nm": {"kernel": "cpu"}})
LOAD = """
import sys, torch, maskgen, sparse_serve
model = maskgen.load(sys.argv[1])
with torch.inference_mode():
    logits = model(torch.arange(8)[None]).logits
assert bool(torch.isfinite(logits).all()), logits
print(maskgen.__file__, sparse_serve.__file__, tuple(logits.shape))
"""


def install(wheel: Path, folder: Path) -> None:
    """A new environment with the packages of the lock and the wheel, and nothing else."""
    environment = folder / "environment"
    _say(f"installing {wheel.name} and the lock into {environment}")
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps"]
    subprocess.run([*pip, "-r", str(LOCK)], check=True)
    subprocess.run([*pip, "--no-index", str(wheel.resolve())], check=True)


def check(folder: Path) -> None:
    """Every step of a user, in `folder`. Raises `SystemExit` at the first one that fails."""
    user = User(folder)
    missing = set(
        re.findall(r"requires (\S+), which is not installed", user.run("python", "-m", "pip", "check", fails=True))
    )
    if missing != LEFT_OUT:
        raise SystemExit(f"error: pip check names {sorted(missing)}; expected {sorted(LEFT_OUT)}")
    doctor = user.run("sparse-serve", "doctor")
    if "  cpu: right" not in doctor:
        raise SystemExit(f"error: sparse-serve doctor does not say that the kernel `cpu` is right:\n{doctor}")
    _say(doctor)
    models.save("llama", folder / "dense", **SHAPE)
    (folder / "text.txt").write_text(models.TEXT, "utf-8")
    few = ["--set", "calibration.samples=4", "--set", "calibration.window_tokens=64"]
    user.run("maskgen", "run", "wanda", *few, "--model", "dense", "--data", "text.txt", "--out", "sparse")
    _say(user.run("maskgen", "inspect", "sparse").splitlines()[0])
    loaded = user.run("python", "-c", LOAD, "sparse")
    if loaded.count(str(folder)) != 2:
        raise SystemExit(f"error: the packages are not those of the new environment: {loaded}")
    _say(user.serve("sparse"))


class User:
    """Somebody in a folder with an environment and no tree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "environment/bin"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SPARSE_SERVE_"))}
        own = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        path = {"PATH": f"{self.bin}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1"}
        self.environ = kept | own | path

    def run(self, command: str, *arguments: str, fails: bool = False) -> str:
        """What a command of the environment prints. Raises `SystemExit` where it fails, unless it may."""
        done = subprocess.run(
            [str(self.bin / command), *arguments],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if done.returncode and not fails:
            raise SystemExit(
                f"error: {command} {arguments}: {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done.stdout

    def serve(self, checkpoint: str) -> str:
        """Serve by the kernel `cpu`, generate over gRPC, stop. Returns which kernels served, and the text."""
        output = self.folder / "server.txt"
        ports = ["--http-port", "0", "--grpc-port", "0", "--additional-config", KERNEL]
        with output.open("w") as file:
            command = [str(self.bin / "sparse-serve"), "serve", checkpoint, *ports]
            server = subprocess.Popen(
                command, cwd=self.folder, env=self.environ, stdout=file, stderr=file, start_new_session=True
            )
        try:
            began = time.monotonic()
            while "  gRPC  " not in output.read_text():
                ended = server.poll() is not None
                if ended or time.monotonic() - began > START_S:
                    how = f"ended with status {server.returncode}" if ended else f"was not ready in {START_S:.0f} s"
                    raise SystemExit(f"error: the server {how}:\n{output.read_text()[-3000:]}")
                time.sleep(0.5)
            (http,) = re.findall(r"HTTP  (\S+)", output.read_text())
            (grpc,) = re.findall(r"gRPC  (\S+)", output.read_text())
            kernels = _get(f"{http}/sparse-serve/info")["engine"]["kernels"]
            text = self.run("sparse-serve", "generate", "--address", grpc, "--max-tokens", "8", "On day 3 the")
        finally:
            server.terminate()
            server.wait(60)
        if set(kernels) != {"cpu"} or not text.strip():
            raise SystemExit(f"error: served by {kernels}, and generated {text!r}; expected kernel cpu, and a text")
        return f"served by {kernels}, generated {text.strip()!r}"


def _get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.load(answer)


def _say(line: str) -> None:
    sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.flush()


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description="Check a wheel in an environment of its own.")
    steps = parser.add_subparsers(dest="step", required=True)
    for step in ("install", "check"):
        part = steps.add_parser(step)
        if step == "install":
            part.add_argument("wheel", type=Path)
        part.add_argument("folder", type=Path)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.step == "install":
        install(args.wheel, folder)
    else:
        check(folder)


if __name__ == "__main__":
    main()
