"""Parameters that are split by rows over processes (FSDP): the rows of this process, and the whole again.

N:M groups run along columns and shards along rows, so a shard holds whole groups: a mask, a proximal map or an
optimiser can work on the rows of one process as on the whole matrix.

Legend: O = out features, I = in features.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that this process holds, sharing their memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered from all processes; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(parameter: Tensor, whole_OI: Tensor) -> Tensor:
    """The rows of `whole_OI`, which every process holds, that belong to `local(parameter)`. No process sends
    anything."""
    if not isinstance(parameter, DTensor):
        return whole_OI
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole_OI, mesh, placements, src_data_rank=None).to_local()
