"""Makes `sparse_serve/api/pb/` from the `.proto` files: `python proto/generate.py`.

protoc names Python modules after the file's path (`sparse_serve/v1/generation_pb2.py`), which would put generated files
into the hand-written package. They go to `sparse_serve/api/pb/v1/` instead, and the one import that protoc writes
between its own files is changed to match. The result is committed, so that installing needs no protoc; a test
regenerates it and compares.
"""

import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent
OUT_DIR = PROTO_DIR.parent / "sparse_serve" / "api" / "pb"
SOURCES = sorted(PROTO_DIR.glob("sparse_serve/**/*.proto"))


def generate() -> dict[str, str]:
    """Run protoc over every source. Returns path relative to `OUT_DIR` -> text."""
    with tempfile.TemporaryDirectory() as scratch:
        flags = [f"--{kind}_out={scratch}" for kind in ("python", "pyi", "grpc_python")]
        status = protoc.main(["protoc", f"--proto_path={PROTO_DIR}", *flags, *map(str, SOURCES)])
        if status != 0:
            raise SystemExit(f"protoc failed with status {status}: see its messages above")
        made = Path(scratch) / "sparse_serve"
        files = {str(path.relative_to(made)): path.read_text() for path in sorted(made.rglob("*.py*"))}
    return {name: _move_imports(text) for name, text in files.items()}


def _move_imports(text: str) -> str:
    return re.sub(r"^from sparse_serve\.(v\d+) import", r"from sparse_serve.api.pb.\1 import", text, flags=re.MULTILINE)


def main() -> int:
    """Write the generated files."""
    for name, text in generate().items():
        target = OUT_DIR / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        sys.stdout.write(f"{target.relative_to(PROTO_DIR.parent)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
