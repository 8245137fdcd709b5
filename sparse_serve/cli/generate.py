"""`sparse-serve generate`: one prompt to a running server over gRPC, the answer printed as it comes."""

import argparse
import sys

import grpc

from sparse_serve.api.pb.v1 import generation_pb2 as pb
from sparse_serve.api.pb.v1 import generation_pb2_grpc
from sparse_serve.runtime.errors import ServeError


class CallError(ServeError, RuntimeError):
    """The server refused a call, or could not be reached."""


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
    """Stream the answer to standard output. Raises `CallError`."""
    if not 0 < args.max_tokens < 2**31:
        raise CallError(f"--max-tokens is {args.max_tokens}; expected 1 or more")
    sampling = pb.Sampling(max_tokens=args.max_tokens, temperature=args.temperature)
    request = pb.GenerateStreamRequest(text=args.prompt, sampling=sampling, model=args.model)
    with grpc.insecure_channel(args.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        try:
            for response in stub.GenerateStream(request, timeout=args.timeout_s):
                sys.stdout.write(response.text)
                sys.stdout.flush()
        except grpc.RpcError as error:
            raise CallError(f"{args.address}: {error.code().name}: {error.details()}") from None
    sys.stdout.write("\n")
    return 0
