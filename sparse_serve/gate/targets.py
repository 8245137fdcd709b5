"""The two targets of a gate: what can be known of them before minutes are spent on measuring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgen.core.checkpoint import SparseCheckpoint, check_directory, read_headers
from maskgen.core.config import CONFIG_KEY, QUANT_METHOD
from maskgen.core.digest import digest_weights
from maskgen.core.files import read_json
from sparse_serve.gate.config import TargetConfig
from sparse_serve.runtime.errors import SettingsError


@dataclass(frozen=True)
class Target:
    """A directory, with the digest of its weights and the checkpoint if it is sparse, or a server's address."""

    config: TargetConfig
    hf_config: dict[str, Any]
    digest: str | None = None
    checkpoint: SparseCheckpoint | None = None

    @property
    def directory(self) -> Path | None:
        """The model directory; None for a server."""
        return self.config.model

    @property
    def label(self) -> str:
        """For reports: the directory's name, not where it lay on this machine, or the server's address."""
        if self.config.model is not None:
            return self.config.model.resolve().name
        return f"{self.config.url} {self.config.name or ''}".rstrip()


def find(config: TargetConfig) -> Target:
    """Check a directory and what it says of itself. Raises `FormatError` or `SettingsError`. A server is not asked."""
    if config.model is None:
        return Target(config, {})
    check_directory(config.model)
    hf_config = read_json(config.model / "config.json")
    stored = hf_config.get(CONFIG_KEY)
    if isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD:
        return Target(config, hf_config, checkpoint=SparseCheckpoint.open(config.model))
    read_headers(config.model)  # a file that was cut off is no other model
    return Target(config, hf_config, digest_weights(config.model))


def check_base(base: Target, candidate: Target, allow_other_base: bool) -> bool | None:
    """Whether a sparse candidate was made from the base, by digests; None where that cannot be known.

    Raises `SettingsError` if it was not and that is not allowed.
    """
    if candidate.checkpoint is None or base.digest is None:
        return None
    expected = candidate.checkpoint.config.base_digest
    if base.digest == expected:
        return True
    if not allow_other_base:
        raise SettingsError(
            f"{candidate.directory} was made from another model than {base.directory} (digest {expected}, not "
            f"{base.digest}); give its base, or allow another: --allow-other-base, in gate.yaml allow_other_base: true"
        )
    return False
