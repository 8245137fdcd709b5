"""API keys of both APIs: read from a file, read again when it changes, compared in constant time.

One key in each line; empty lines and what begins with `#` do not count. Only digests of keys are held, and a client is
known by the first digits of its key's digest, so that no key can get into a log or a metric.
"""

import hashlib
import hmac
import logging
import time
from pathlib import Path

from sparse_serve.runtime.errors import SettingsError, UnauthenticatedError

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_MIN_LENGTH = 16


class Keys:
    """The keys in a file. Raises `SettingsError` for one that cannot be read, or has no key or a short one. `flag` is
    where the file was named."""

    def __init__(self, path: Path, flag: str = "--api-keys") -> None:
        self._path, self._flag = path, flag
        self._state = self._stat()  # before reading: a change between the two is seen later, not never
        self._digests = self._read()
        self._looked_s = time.monotonic()

    def client(self, authorization: str | None) -> str:
        """Who sends this `Authorization` header, `Bearer KEY`. Raises `UnauthenticatedError`, also for none."""
        self._refresh()
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode(errors="replace")).digest()
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(found):
            raise UnauthenticatedError("send a key of this server: `Authorization: Bearer KEY`")
        return f"key-{digest.hex()[:8]}"

    def _refresh(self) -> None:
        """Read the file again if it has changed. One that has become unreadable leaves the keys as they are."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        try:
            state = self._stat()
            if state == self._state:
                return
            self._digests, self._state = self._read(), state
            logger.info("read %d keys from %s", len(self._digests), self._path)
        except SettingsError as error:
            logger.error("the keys stay as they were: %s", error)

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise SettingsError(f"{self._flag} {self._path}: {error.strerror}") from None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> list[bytes]:
        try:
            lines = self._path.read_text().splitlines()
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{self._flag} {self._path}: {getattr(error, 'strerror', None) or 'no text file'}; expected a file "
                "with one key in each line"
            ) from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys or any(len(key) < _MIN_LENGTH or " " in key for key in keys):
            raise SettingsError(
                f"{self._flag} {self._path}: expected one key in each line, of at least {_MIN_LENGTH} characters, no "
                f"spaces; make one with `python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
            )
        return [hashlib.sha256(key.encode()).digest() for key in keys]
