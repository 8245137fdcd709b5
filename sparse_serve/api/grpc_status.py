"""How a gRPC call ends that fails: its status, details that programs can read (google.rpc), and the id of the request.

`ErrorInfo` has a reason that does not change with its wording, `BadRequest` the field that is wrong, `RetryInfo` is
there where trying again makes sense; clients may take its absence for "do not".
"""

import secrets
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from sparse_serve.runtime.errors import Answer, BadRequestError, answer
from sparse_serve.server.admission import Admission
from sparse_serve.server.body_limits import check_request_id

DOMAIN = "sparse-serve"
REQUEST_ID = "x-request-id"


async def abort(call: Any, error: Exception, id_: str, reply: Answer | None = None) -> None:
    """End a call with the status that an exception stands for. `reply` is the answer to it, if it was looked up."""
    reply = reply or answer(error)
    code = grpc.StatusCode[reply.grpc_code]
    metadata = (("grpc-status-details-bin", _details(code, reply, error)), (REQUEST_ID, id_))
    await call.abort(code, reply.message, trailing_metadata=metadata)


async def refuse(admission: Admission, path: str, call: Any, error: Exception) -> None:
    """Count and end a call that no service has seen; `path` is `/SERVICE/METHOD` of one that there is."""
    with admission.request("grpc", path.rpartition("/")[2], holds_drain=False) as outcome:
        outcome.id = new_id()
        try:
            outcome.id = request_id(call, outcome.id)
        except BadRequestError as worse:
            error = worse
        reply = answer(error)
        outcome.code = reply.grpc_code
        await abort(call, error, outcome.id, reply)


def new_id() -> str:
    """An id for a request that has none."""
    return secrets.token_hex(16)


def metadata_value(call: Any, wanted: str) -> Any:
    """The first value of this name in the metadata of a call; None: there is none."""
    return next((value for name, value in call.invocation_metadata() or () if name == wanted), None)


def request_id(call: Any, new: str) -> str:
    """The client's id, or the new one. Raises `BadRequestError` for an id of a client that is none."""
    given = metadata_value(call, REQUEST_ID)
    if given is None:
        return new
    check_request_id(f"the metadata {REQUEST_ID}", given)
    return str(given)


def _details(code: grpc.StatusCode, reply: Answer, error: Exception) -> bytes:
    reason = type(error).__name__ if reply.grpc_code != "INTERNAL" else "InternalError"
    details: list[Any] = []
    if reply.retry_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(reply.retry_s * 1000))
        details.append(retry)
    if isinstance(error, BadRequestError) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=reply.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    details.append(error_details_pb2.ErrorInfo(reason=_upper(reason), domain=DOMAIN))
    status = status_pb2.Status(code=code.value[0], message=reply.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    serialized: bytes = status.SerializeToString()
    return serialized


def _upper(name: str) -> str:
    """`BadRequestError` as `BAD_REQUEST`."""
    words = "".join(f"_{letter}" if letter.isupper() else letter for letter in name.removesuffix("Error"))
    return words.removeprefix("_").upper()
