"""Rows of sharded parameters: what this process holds, and what goes with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from maskgen.numerics.shards import full, local, rows_of

WHOLE_OI = torch.arange(28.0).view(7, 4)


def test_plain_tensors_pass_through() -> None:
    assert local(WHOLE_OI) is WHOLE_OI and full(WHOLE_OI) is WHOLE_OI
    mask_OI = WHOLE_OI > 3
    assert rows_of(WHOLE_OI, mask_OI) is mask_OI


@pytest.fixture
def third_of_three() -> Iterator[None]:
    """This process as the last of three that never speak to each other."""
    dist.init_process_group("fake", rank=2, world_size=3, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("third_of_three")
def test_a_shard_knows_its_rows() -> None:
    mesh = init_device_mesh("cpu", (3,))
    rows_oI = WHOLE_OI[6:].clone()  # shards of 3, 3 and 1 rows
    sharded_OI = DTensor.from_local(rows_oI, mesh, [Shard(0)], shape=WHOLE_OI.shape, stride=(4, 1))
    local(sharded_OI).mul_(2)
    assert torch.equal(rows_oI, WHOLE_OI[6:] * 2), "memory is shared"
    assert torch.equal(rows_of(sharded_OI, WHOLE_OI > 25), WHOLE_OI[6:] > 25)


def test_full_gathers(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded_OI = DTensor.from_local(WHOLE_OI, mesh, [Shard(0)])
        assert torch.equal(full(sharded_OI), WHOLE_OI) and not isinstance(full(sharded_OI), DTensor)
    finally:
        dist.destroy_process_group()
