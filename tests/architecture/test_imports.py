"""Importing any module does nothing but define things, also in a process that a server has started.

The libraries are imported first, as what they do is not looked at here. Then each module is imported in a process that
has a server's private variables, once with that server alive and once with it dead.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.architecture.source import PACKAGES, ROOT, module_name, python_files, tree

FILES = python_files(*PACKAGES)


def libraries() -> list[str]:
    """Modules of others that one of our files imports when it is imported."""
    found: set[str] = set()
    for node in (node for path in FILES for node in tree(path).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return sorted(name for name in found if name.split(".")[0] not in PACKAGES)


def state() -> dict[str, Any]:
    """What an import could have changed."""
    loggers = {"": logging.getLogger()} | {
        name: logger for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)
    }
    return {
        "threads": [thread.name for thread in threading.enumerate()],
        "logging": {name: (len(log.handlers), log.level, log.propagate) for name, log in loggers.items()},
        "environment": dict(os.environ),
        "GPU": list(gpu_calls),
    }


gpu_calls: list[str] = []


def watch_gpu() -> None:
    """Note every question to a GPU, also on a machine that has none."""
    import torch

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: (gpu_calls.append(name), original(*arguments, **named))[1]

    for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_capability"):
        setattr(torch.cuda, name, noted(name, getattr(torch.cuda, name)))


def watched_import(name: str) -> list[str]:
    """Import a module; what that changed. A logger that is only new is no change."""
    before = state()
    import_module(name)
    after = state()
    after["logging"] = {
        name: facts for name, facts in after["logging"].items() if before["logging"].get(name) or facts[0]
    }
    return [f"{name}: {what}" for what in before if before[what] != after[what]]


def main(names: list[str]) -> None:
    """Import `names` in two forked processes; print what was found in each, and how it ended, as JSON."""
    for name in libraries():
        import_module(name)
    watch_gpu()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    found = {}
    for server, pid in (("alive", os.getpid()), ("dead", dead.pid)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.environ["_SPARSE_SERVE_LEADER"] = str(pid)
            os.environ["_SPARSE_SERVE_STARTUP_ERROR"] = os.devnull
            os.environ["_SPARSE_SERVE_VERIFIED"] = "sha256:0"
            for name in names:
                os.write(writing, "".join(line + "\n" for line in watched_import(name)).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            lines = pipe.read().splitlines()
        found[server] = [*lines, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]
    sys.stdout.write(json.dumps(found) + "\n")


GUILTY = {
    "guilty_of_threads": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "guilty_of_logging": "import logging; logging.basicConfig()",
    "guilty_of_environment": "import os; os.environ['X'] = '1'",
    "guilty_of_GPU": "import torch; torch.cuda.is_available()",
    "guilty_of_following": "from sparse_serve.runtime import processes; processes.follow()",
}
"""Modules whose import has an effect: that this test finds them shows that it would find one of ours."""


def test_importing_a_module_has_no_effect(tmp_path: Path) -> None:
    for name, effect in GUILTY.items():
        (tmp_path / f"{name}.py").write_text(effect)
    ours = [module_name(path) for path in FILES]
    assert {"sparse_serve.cli.main", "sparse_serve.plugin.linear", "maskgen.__main__"} <= set(ours)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-m", "tests.architecture.test_imports", *ours, *GUILTY]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [f"{name}: {name.removeprefix('guilty_of_')}" for name in list(GUILTY)[:-1]]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "alive": [*found, "guilty_of_following: threads", 0],
        "dead": [*found, 1],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
