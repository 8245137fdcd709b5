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

from tests.deploy.hosts import FOLDER, Host
from tests.sparse_serve.running import Running, running
from tests.sparse_serve.server.test_tls import REFUSED, Authority, over_grpc, over_http

CERTIFICATES = "/etc/nginx/sparse-serve/tls"


@dataclass
class Reached:
    """The two addresses of nginx, as `over_http` and `over_grpc` want them."""

    http: httpx.AsyncClient
    grpc_address: str


@contextmanager
def nginx(host: Host, server: Running, is_mutual: bool) -> Iterator[Reached]:
    settings = (FOLDER / "tls.conf").read_text().replace(CERTIFICATES, str(host.folder))
    if is_mutual:
        settings, count = re.subn("^# (ssl_client_certificate)", r"\1", settings, flags=re.MULTILINE)
        assert count == 1
    file = host.folder / "nginx/included.conf"
    conf, count = re.subn(
        r"# With tls\.conf: listen \d+ ([^;]*);\s*listen (\S+:\d+)[^;]*;", r"listen \2 \1;", file.read_text()
    )
    assert count == 2
    file.write_text(settings + conf)
    url = server.http.base_url
    for api, address in (("http", f"{url.host}:{url.port}"), ("grpc", server.grpc_address)):
        (host.folder / f"nginx/sparse-serve/{api}.servers").write_text(f"server {address} max_fails=0;\n")
    subprocess.run(host.nginx, check=True)
    try:
        yield Reached(httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.http}"), f"127.0.0.1:{host.grpc}")
    finally:
        subprocess.run([*host.nginx, "-s", "stop"], check=True)


@pytest.mark.parametrize("is_mutual", [False, True])
async def test_nginx_ends_tls_for_both_apis(is_mutual: bool, tmp_path: Path) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    ours, other = Authority.new("ours"), Authority.new("other")
    ours.write(tmp_path, "server")
    (tmp_path / "clients.pem").write_bytes(ours.pem)
    good, wrong = ours.write(tmp_path, "client"), other.write(tmp_path, "stranger")
    async with running() as server:
        with nginx(Host(tmp_path, ""), server, is_mutual) as reached:
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
