"""`deploy/rolling/tls.conf`: a real nginx ends TLS for both APIs, the server's own on an engine without a model."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from tests.deploy.hosts import FOLDER, Host, free_ports
from tests.sparse_serve.running import Running, running
from tests.sparse_serve.server.test_tls import REFUSED, Authority, over_grpc, over_http

CERTIFICATES = "/etc/nginx/sparse-serve/tls"


NEIGHBOUR = """
server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {folder}/neighbour.pem;
    ssl_certificate_key {folder}/neighbour.key;
    location / {{ return 200; }}
}}
"""
"""What this nginx serves beside ours, with a certificate of its own, to everybody."""


@dataclass
class Reached:
    """The two addresses of nginx, as `over_http` and `over_grpc` want them."""

    http: httpx.AsyncClient
    grpc_address: str

    @classmethod
    def at(cls, http_port: int, grpc_port: int) -> Reached:
        return cls(httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}"), f"127.0.0.1:{grpc_port}")


@contextmanager
def nginx(host: Host, server: Running, is_mutual: bool) -> Iterator[tuple[Reached, Reached]]:
    """Ours, and a neighbour, in one nginx."""
    *_, neighbour = free_ports(7)  # the host has six of them
    settings = (FOLDER / "tls.conf").read_text().replace(CERTIFICATES, str(host.folder))
    if is_mutual:
        settings, count = re.subn("^# (ssl_client_certificate)", r"\1", settings, flags=re.MULTILINE)
        assert count == 1
    (host.folder / "nginx/sparse-serve/tls.conf").write_text(settings)
    file = host.folder / "nginx/included.conf"
    conf, count = re.subn(
        r"# With TLS: listen \d+ ([^;]*); (include [^;]*;)\s*listen (\S+:\d+)[^;]*;",
        r"listen \3 \1; \2",
        file.read_text(),
    )
    assert count == 2
    file.write_text(conf + NEIGHBOUR.format(port=neighbour, folder=host.folder))
    url = server.http.base_url
    for api, address in (("http", f"{url.host}:{url.port}"), ("grpc", server.grpc_address)):
        (host.folder / f"nginx/sparse-serve/{api}.servers").write_text(f"server {address} max_fails=0;\n")
    subprocess.run(host.nginx, check=True)
    try:
        yield Reached.at(host.http, host.grpc), Reached.at(neighbour, neighbour)
    finally:
        subprocess.run([*host.nginx, "-s", "stop"], check=True)


def test_what_else_an_nginx_serves_keeps_its_settings() -> None:
    """Outside of its own servers the file says nothing but where ours are."""
    text = re.sub("#.*", "", (FOLDER / "nginx.conf").read_text())
    outside = re.sub(r"\{(?:[^{}]|\{[^{}]*\})*\}", "{}", text).split()
    upstreams = ["upstream", "sparse_serve_http", "{}", "upstream", "sparse_serve_grpc", "{}"]
    assert outside == [*upstreams, "server", "{}", "server", "{}"]


@pytest.mark.parametrize("is_mutual", [False, True])
async def test_nginx_ends_tls_for_both_apis(is_mutual: bool, tmp_path: Path) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    ours, other = Authority.new("ours"), Authority.new("other")
    ours.write(tmp_path, "server")
    other.write(tmp_path, "neighbour")
    (tmp_path / "clients.pem").write_bytes(ours.pem)
    good, wrong = ours.write(tmp_path, "client"), other.write(tmp_path, "stranger")
    async with running() as server:
        with nginx(Host(tmp_path, ""), server, is_mutual) as (reached, neighbour):
            assert await over_http(neighbour, other) == 200
            client = good if is_mutual else None
            assert (await over_http(reached, ours, client), await over_grpc(reached, ours, client)) == (200, "ab")
            with pytest.raises(REFUSED):
                await over_http(reached, other, client)
            with pytest.raises(REFUSED):
                await over_grpc(reached, other, client)
            if is_mutual:
                for nobody in (None, wrong):
                    assert await over_http(reached, ours, nobody) == httpx.codes.BAD_REQUEST
                    with pytest.raises(grpc.aio.AioRpcError):
                        await over_grpc(reached, ours, nobody)
