"""TLS of both APIs: one certificate, its key, and for mutual TLS the authority of clients; read again when they change.

A connection that is open keeps the certificate it began with. Files that do not fit together (a certificate is
replaced before its key) leave the old ones in force until they do.
"""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from sparse_serve.runtime.errors import SettingsError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. With `client_ca`, a client has to show a certificate that it signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """Their contents. Raises `SettingsError`, which names the flag."""
        found = []
        for flag, path in (("cert", self.certificate), ("key", self.key), ("client-ca", self.client_ca)):
            try:
                found.append(path.read_bytes() if path is not None else None)
            except OSError as error:
                raise SettingsError(f"--tls-{flag} {path}: {error.strerror}; expected a PEM file") from None
        certificate, key, client_ca = found
        assert certificate is not None and key is not None
        return certificate, key, client_ca

    def context(self) -> ssl.SSLContext:
        """A server's context. Raises `SettingsError` for files that do not fit together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
            if self.client_ca is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                # a session that is resumed is not verified again, and older versions resume without tickets, too
                context.minimum_version, context.num_tickets = ssl.TLSVersion.TLSv1_3, 0
                context.load_verify_locations(self.client_ca)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise SettingsError(
                f"--tls-cert {self.certificate}, --tls-key {self.key}: {error}; expected a certificate chain and its "
                "key without a passphrase, and with --tls-client-ca certificates of authorities, all in PEM"
            ) from None
        return context


class Tls:
    """What both APIs serve with; `context` is for HTTP. Raises `SettingsError` for files that cannot be used."""

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self.contents = files.read()
        """Of the certificate, its key and the authority of clients, as they are in force."""
        self._current = files.context()
        # a context cannot unlearn an authority, so a new one takes over at the beginning of a handshake
        self.context = files.context()
        self.context.sni_callback = self._take_over

    def refresh(self) -> None:
        """Read the files again, and use them if they have changed."""
        try:
            contents = self.files.read()
            if contents == self.contents:
                return
            self._current = self.files.context()
        except SettingsError as error:
            logger.error("the certificate stays as it was: %s", error)
            return
        self.contents = contents
        logger.info("read the certificate again: %s", self.files.certificate)

    def _take_over(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        self.refresh()
        connection.context = self._current


def _no_password() -> str:
    raise ValueError("the key has a passphrase")
