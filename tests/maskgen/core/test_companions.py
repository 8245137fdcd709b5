"""What is copied beside weights and downloaded with them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from maskgen.core.companions import SNAPSHOT_PATTERNS, check_companions, companion_files
from maskgen.core.errors import FormatError

COPIED = [
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "qwen.tiktoken",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
]
NEVER = ["modeling_x.py", "pytorch_model.bin", "README.md", "consolidated.pth"]
WRITTEN_WITH_WEIGHTS = ["config.json", "model.safetensors.index.json", "params.json"]


def test_tokenizer_and_settings_are_copied_and_neither_code_nor_weights(tmp_path: Path) -> None:
    for name in [*COPIED, *NEVER, *WRITTEN_WITH_WEIGHTS, "model.safetensors"]:
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder.json").mkdir()
    assert [path.name for path in companion_files(tmp_path)] == sorted(COPIED)


def test_a_snapshot_holds_the_weights_and_everything_that_is_copied() -> None:
    def downloaded(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in SNAPSHOT_PATTERNS)

    assert all(map(downloaded, [*COPIED, "config.json", "model-00001-of-00002.safetensors"]))
    assert not any(map(downloaded, NEVER))


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "config.json", "model.safetensors.index.json"])
def test_a_name_without_a_file_is_told(name: str, tmp_path: Path) -> None:
    """Links into a cache whose files are gone, say: they look like files to whoever lists the directory."""
    (tmp_path / "README.md").symlink_to("nowhere")
    check_companions(tmp_path)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(FormatError, match=f"{name}: a link to no file; remove it, or download the model again"):
        check_companions(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(FormatError, match=f"{name}: not a regular file"):
        check_companions(tmp_path)
