"""What a checkpoint was written with besides its weights: a record of `config.json` and of the files beside it.

Shards have digests in the manifest. What else decides a model's numbers, such as `rms_norm_eps` or the tokenizer, is in
files that anybody may edit, and a model with another value in them still answers, only wrongly. So a writer leaves
`maskgen_settings.json` beside a sparse checkpoint, which holds

    config    all of `config.json` but the manifest, whose content is verified by itself, and notes that decide nothing
    files     the digest of every companion file (`companions`): tokenizer, generation settings, chat template

It is a file of its own, and not a part of the manifest, so that readers of any age read the checkpoint, and one without
it stays what it was. It finds an edit, not a forger: who can change one file can change both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgen.core.companions import SETTINGS_FILE, companion_files
from maskgen.core.config import CONFIG_KEY, WEIGHTS_KEY
from maskgen.core.digest import check_digest, digest_file
from maskgen.core.errors import FormatError, clip
from maskgen.core.files import check_keys, read_json

NOT_RECORDED = "there is no record of what was written (maskgen convert writes the checkpoint again, with one)"
"""For people, about a checkpoint whose `config.json` cannot be checked."""

_FORMAT_VERSION = 1
_NOTES = (CONFIG_KEY, WEIGHTS_KEY, "_name_or_path", "transformers_version")
"""Keys of `config.json` that are not recorded."""

_LOADED = ("added_tokens", "chat_template", "generation_config", "merges", "special_tokens_map", "tokenizer", "vocab")
"""What the names of files begin with that an engine loads because they are there."""

_ABSENT = object()
_AGAIN = "put back what was there; if the change is meant, `maskgen convert {} --out NEW` writes a checkpoint with it"


@dataclass(frozen=True)
class SettingsRecord:
    """`config`: what `config.json` said, without what is not recorded. `files`: digests of companion files by name."""

    config: Mapping[str, Any]
    files: Mapping[str, str]

    @classmethod
    def of(cls, path: Path, hf_config: Mapping[str, Any]) -> SettingsRecord:
        """Of the files in a directory, as they are now."""
        return cls(_recorded(hf_config), {file.name: digest_file(file) for file in companion_files(path)})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object in the file."""
        return {"format_version": _FORMAT_VERSION, "config": dict(self.config), "files": dict(self.files)}

    @classmethod
    def read(cls, path: Path) -> SettingsRecord | None:
        """The record in a directory; None if it has none. Raises `FormatError` for a damaged one."""
        file = path / SETTINGS_FILE
        if not file.exists() and not file.is_symlink():
            return None
        value = read_json(file)
        check_keys(value, ("format_version", "config", "files"), str(file))
        if type(value["format_version"]) is not int or value["format_version"] != _FORMAT_VERSION:
            raise FormatError(
                f"{file}: format_version {clip(value['format_version'])}, this release reads {_FORMAT_VERSION}; "
                "upgrade sparse-serve"
            )
        for key in ("config", "files"):
            if not isinstance(value[key], dict):
                raise FormatError(f"{file}: {key} is a {type(value[key]).__name__}, expected an object")
        for name, digest in value["files"].items():
            check_digest(digest, f"{file}: {clip(name)}")
        return cls(value["config"], value["files"])

    def check_config(self, path: Path) -> None:
        """Raise `FormatError` for the first key of `config.json` whose value is not the recorded one."""
        file = path / "config.json"
        for key, then, now in _differences(self.config, _recorded(read_json(file)), ""):
            was, is_ = ("absent" if value is _ABSENT else clip(value) for value in (then, now))
            raise FormatError(
                f"{file}: {clip(key)[1:-1]} is {is_}, and was {was} when this checkpoint was written; "
                f"{_AGAIN.format(path)}"
            )

    def changes(self, path: Path) -> list[str]:
        """What became of companion files, a line for each that begins with its name."""
        now = {file.name: digest_file(file) for file in companion_files(path)}
        lines = []
        for name in sorted(self.files.keys() | now.keys()):
            if name not in now:
                lines.append(f"{name}: gone since this checkpoint was written")
            elif name in self.files and self.files[name] != now[name]:
                lines.append(f"{name}: changed since this checkpoint was written")
            elif name not in self.files and name.startswith(_LOADED):
                lines.append(f"{name}: not there when this checkpoint was written")
        return lines


def check_settings(path: Path | str) -> SettingsRecord | None:
    """Compare `config.json` and the files beside it with the record, which is returned; None if there is none.

    Raises `FormatError`, which names the key or the file, for anything that is not as it was written.
    """
    path = Path(path)
    record = SettingsRecord.read(path)
    if record is not None:
        record.check_config(path)
        if changes := record.changes(path):
            raise FormatError(f"{path}/{changes[0]}; {_AGAIN.format(path)}")
    return record


def check_recorded_config(path: Path | str) -> None:
    """Raise `FormatError` if `config.json` is not as it was written, as far as there is a record that tells."""
    record = SettingsRecord.read(Path(path))
    if record is not None:
        record.check_config(Path(path))


def changed_companions(path: Path | str) -> tuple[str, ...]:
    """What became of the files beside the weights since they were written, a line for each that begins with a file's
    name; none without a record."""
    record = SettingsRecord.read(Path(path))
    return () if record is None else tuple(record.changes(Path(path)))


def _recorded(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in hf_config.items() if key not in _NOTES}


def _differences(then: Any, now: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """The places in which two JSON values differ, as (dotted name, value then, value now)."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            name = f"{where}.{key}" if where else key
            yield from _differences(then.get(key, _ABSENT), now.get(key, _ABSENT), name)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for index, pair in enumerate(zip(then, now, strict=True)):
            yield from _differences(*pair, f"{where}[{index}]")
    elif then != now or isinstance(then, bool) != isinstance(now, bool):
        yield where, then, now
