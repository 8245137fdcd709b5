"""TLS and mutual TLS on both ports, with certificates made here."""

import asyncio
import datetime
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.api.pb.v1 import generation_pb2_grpc
from sparse_serve.runtime.errors import SettingsError
from tests.sparse_serve.running import Running, running


@dataclass
class Authority:
    """A certificate authority, and what it signs."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def new(cls, name: str) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(key, _sign(name, key, name, key, True))

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """A certificate for this machine under a new key, as PEM files."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self.certificate.subject.rfc4514_string().removeprefix("CN=")
        certificate, private = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(_pem(_sign(name, key, issuer, self.key, False)))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, private

    @property
    def pem(self) -> bytes:
        return _pem(self.certificate)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _sign(name, key, issuer, issuer_key, is_authority) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(True, False, False, False, False, is_authority, is_authority, False, False)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(is_authority, None), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
        .sign(issuer_key, hashes.SHA256())
    )


async def over_http(server: Running, authority: Authority, client: tuple[Path, Path] | None = None) -> int:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    if client is not None:
        context.load_cert_chain(*client)
    url = f"https://{server.http.base_url.host}:{server.http.base_url.port}/ready"
    async with httpx.AsyncClient(verify=context) as http:
        return (await http.get(url)).status_code


async def over_grpc(server: Running, authority: Authority, client: tuple[Path, Path] | None = None) -> str:
    chain, key = (None, None) if client is None else (client[0].read_bytes(), client[1].read_bytes())
    credentials = grpc.ssl_channel_credentials(authority.pem, key, chain)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    async with grpc.aio.secure_channel(server.grpc_address, credentials, options) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        answer = await stub.Generate(pb.GenerateRequest(text="ab", sampling=pb.Sampling(max_tokens=2)), timeout=5)
        return answer.text


REFUSED = (httpx.TransportError, grpc.aio.AioRpcError)


async def test_both_ports_speak_tls_and_take_a_new_certificate(tmp_path: Path) -> None:
    first, second = Authority.new("first"), Authority.new("second")
    certificate, key = first.write(tmp_path, "server")
    async with running(tls_cert=str(certificate), tls_key=str(key)) as server:
        assert (await over_http(server, first), await over_grpc(server, first)) == (200, "ab")
        with pytest.raises(REFUSED):
            await server.http.get("/ready")
        with pytest.raises(REFUSED):
            await over_http(server, second)
        second.write(tmp_path, "server")
        assert (await over_http(server, second), await over_grpc(server, second)) == (200, "ab")
        key.write_text("half a file")
        assert (await over_http(server, second), await over_grpc(server, second)) == (200, "ab")


async def test_with_an_authority_a_client_needs_a_certificate_of_it(tmp_path: Path) -> None:
    mine, yours = Authority.new("mine"), Authority.new("yours")
    certificate, key = mine.write(tmp_path, "server")
    friend, stranger = mine.write(tmp_path, "friend"), yours.write(tmp_path, "stranger")
    client_ca = tmp_path / "authority.pem"
    client_ca.write_bytes(mine.pem)
    flags = {"tls_cert": str(certificate), "tls_key": str(key), "tls_client_ca": str(client_ca)}
    async with running(**flags) as server:
        assert (await over_http(server, mine, friend), await over_grpc(server, mine, friend)) == (200, "ab")
        for client in (None, stranger):
            for call in (over_http, over_grpc):
                with pytest.raises(REFUSED):
                    await call(server, mine, client)
        client_ca.write_bytes(yours.pem)
        assert (await over_http(server, mine, stranger), await over_grpc(server, mine, stranger)) == (200, "ab")
        for call in (over_http, over_grpc):
            with pytest.raises(REFUSED):
                await call(server, mine, friend)


async def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    authority = Authority.new("mine")
    certificate, key = authority.write(tmp_path, "server")
    _, other = authority.write(tmp_path, "other")
    missing = tmp_path / "missing.pem"
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        authority.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
        )
    )
    for flags, message in (
        ({"tls_cert": str(certificate)}, "belong together"),
        ({"tls_client_ca": str(certificate)}, "--tls-client-ca needs"),
        ({"tls_cert": str(missing), "tls_key": str(key)}, r"--tls-cert .*missing.pem: No such file"),
        ({"tls_cert": str(certificate), "tls_key": str(other)}, r"--tls-key .*other.key"),
        ({"tls_cert": str(certificate), "tls_key": str(locked)}, "passphrase"),
    ):
        with pytest.raises(SettingsError, match=message):
            async with running(**flags):
                pass


async def test_no_session_is_resumed_past_an_authority_that_is_gone(tmp_path: Path) -> None:
    mine, yours = Authority.new("mine"), Authority.new("yours")
    certificate, key = mine.write(tmp_path, "server")
    friend, friends_key = mine.write(tmp_path, "friend")
    client_ca = tmp_path / "authority.pem"
    client_ca.write_bytes(mine.pem)
    flags = {"tls_cert": str(certificate), "tls_key": str(key), "tls_client_ca": str(client_ca)}
    async with running(**flags) as server:
        context = ssl.create_default_context(cadata=mine.pem.decode())
        context.load_cert_chain(friend, friends_key)
        address = server.http.base_url.host, server.http.base_url.port
        session = await asyncio.to_thread(_ask, address, context, None)
        client_ca.write_bytes(yours.pem)
        with pytest.raises((OSError, EOFError)):
            await asyncio.to_thread(_ask, address, context, session)


def _ask(address: tuple[str, int], context: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLSession | None:
    raw = socket.create_connection(address, timeout=5)
    with context.wrap_socket(raw, server_hostname=address[0], session=session) as connection:
        connection.sendall(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
        if not connection.recv(100):
            raise EOFError
        return connection.session


def test_an_address_that_others_reach_is_not_opened_to_all_by_accident() -> None:
    from sparse_serve.server.settings import Settings

    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(SettingsError, match=r"--host .* lets other machines in: give --api-keys"):
            Settings(host=host)
        for flags in ({"insecure": True}, {"api_keys": "keys"}, {"tls_cert": "a", "tls_key": "b"}):
            Settings(host=host, **flags)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        Settings(host=host)
