"""`sparse-serve generate`: one prompt to a running server over gRPC, the answer printed as it comes."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from sparse_serve.client import Client, Message, Sampling, Tls
from sparse_serve.runtime.errors import SettingsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sparse-serve generate`."""
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument(
        "--address", metavar="HOST:PORT", default="127.0.0.1:50051", help="the gRPC API (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="file whose first line is the key that the server asks for"
    )
    parser.add_argument(
        "--tls-ca", metavar="FILE", help="speak TLS, to a server with a certificate of this authority (PEM)"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate to show, where the server asks for one (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="its key (PEM)")
    parser.add_argument(
        "--model", metavar="NAME", default="", help="of the model or LoRA adapter (default: the served model)"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is what a user says: ask through the model's chat template (default: the text is continued)",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=64, help="most tokens to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=None,
        help="of sampling; 0 takes the likeliest token (default: the model's own)",
    )
    parser.add_argument(
        "--timeout-s",
        metavar="S",
        type=float,
        default=300.0,
        help="seconds after which the call is given up (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Stream the answer to standard output. Raises `CallError`, and `SettingsError` for a flag."""
    if not 0 < args.max_tokens < 2**31:
        raise SettingsError(f"--max-tokens is {args.max_tokens}; expected 1 or more")
    sampling: Sampling = {"max_tokens": args.max_tokens}
    if args.temperature is not None:
        sampling["temperature"] = args.temperature
    with _client(args) as client:
        for text in _answer(client, args, sampling):
            sys.stdout.write(text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _answer(client: Client, args: argparse.Namespace, sampling: Sampling) -> Iterator[str]:
    if args.chat:
        said: Message = {"role": "user", "content": args.prompt}
        return (piece.reasoning + piece.content for piece in client.chat_stream([said], model=args.model, **sampling))
    return (piece.text for piece in client.stream(args.prompt, model=args.model, **sampling))


def _client(args: argparse.Namespace) -> Client:
    if bool(args.tls_cert) != bool(args.tls_key):
        raise SettingsError("--tls-cert and --tls-key belong together; give both")
    if args.tls_cert and not args.tls_ca:
        raise SettingsError("--tls-cert needs --tls-ca, the authority of the server's certificate")
    tls = None
    if args.tls_ca:
        files = (None if name is None else Path(name) for name in (args.tls_ca, args.tls_cert, args.tls_key))
        tls = Tls(*files)
    try:
        key = Path(args.api_key_file).read_text().strip().partition("\n")[0] if args.api_key_file else None
        return Client(args.address, key=key, tls=tls, timeout_s=args.timeout_s)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--api-key-file, --tls-ca, --tls-cert or --tls-key: {error}") from None
