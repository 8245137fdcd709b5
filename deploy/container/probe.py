#!/usr/bin/python3 -I
"""Asks the server of this container how it is: `sparse-serve-probe healthz` or `readyz`. Status 0 where it answers 200.

For the image's health check, and for Kubernetes under mutual TLS: the kubelet has no certificate to show. Port and TLS
are read from the server's own variables. Under mutual TLS the server's certificate is shown, so it has to be one of
--tls-client-ca, too. Only the standard library: a probe every few seconds must cost nothing.
"""

import http.client
import os
import ssl
import sys
from collections.abc import Mapping

TIMEOUT_S = 4.0


def ask(path: str, environ: Mapping[str, str]) -> int:
    """The HTTP status of `path`. Raises `OSError` or `http.client.HTTPException` where nobody answers."""
    port = int(environ.get("SPARSE_SERVE_HTTP_PORT", "8000"))
    certificate, key = environ.get("SPARSE_SERVE_TLS_CERT"), environ.get("SPARSE_SERVE_TLS_KEY")
    connection: http.client.HTTPConnection
    if certificate and key:
        # Whom this reaches is certain, it is the same container; a certificate for 127.0.0.1 nobody has.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if environ.get("SPARSE_SERVE_TLS_CLIENT_CA"):
            context.load_cert_chain(certificate, key)
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)
    else:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 for 200, 1 for any other answer or none, 2 for wrong usage."""
    if arguments not in (["healthz"], ["readyz"]):
        print("usage: sparse-serve-probe healthz|readyz", file=sys.stderr)
        return 2
    try:
        status = ask(f"/{arguments[0]}", os.environ)
    except (OSError, http.client.HTTPException) as error:
        print(f"sparse-serve-probe: no answer: {error}", file=sys.stderr)
        return 1
    return int(status != 200)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
