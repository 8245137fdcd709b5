"""Training on several processes, started by `torchrun`: replicas (DDP) or shards (FSDP2), by torch's own means.

    torchrun --nproc-per-node 8 -m maskgen run maskllm --model DIR --data FILE --out DIR --shard

A step sees the same windows however many processes there are: process r of R takes the r-th run of them, with the noise
samples that belong to those windows, and gradients are averaged. So N processes learn what one would, up to rounding.
Process 0 alone reads priors, writes logs and results; checkpoints are written by all. Without `torchrun` every function
here is the identity.

`--shard` splits parameters, gradients and optimiser states by rows over the processes, one decoder block at a time;
masks never straddle a shard, because their groups run along columns.

Legend: B = batch, T = tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from maskgen.core.errors import RecipeError

PATIENCE = timedelta(hours=24)
"""How long processes wait for process 0 to tokenise text, make a prior or seal a checkpoint."""


@dataclass(frozen=True)
class Group:
    """The processes of a run, seen from number `rank` of `world`. `shard` splits states, else every one holds all.

    `waiting` is for `wait` alone, which may take long; all else that is exchanged has torch's usual time limits, so
    that a process that hangs is noticed.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"
    shard: bool = False
    waiting: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is process 0, which speaks and writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
        """The model to run forward passes through. Optimisers are made afterwards: sharding replaces parameters."""
        if self.world > 1 and not self.shard:
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        return self.split(model, blocks)

    def split(self, model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
        """Shard `model` in place if this group shards: every block by itself, and the rest together."""
        if self.shard:
            mesh = init_device_mesh(torch.device(self.device).type, (self.world,))
            for module in (*blocks, model):
                fully_shard(module, mesh=mesh)
        return model

    def accumulating(self, model: nn.Module, more: bool) -> AbstractContextManager[None]:
        """A backward pass after which, if `more` follow in this step, replicas need not exchange gradients yet.

        Shards always do: what FSDP2 would keep until the last one is whole gradients.
        """
        if more and isinstance(model, DistributedDataParallel):
            return model.no_sync()
        return nullcontext()

    def check_batch(self, batch: int, noise_samples: int) -> None:
        """`RecipeError` unless every process gets equally many windows of equally many noise samples."""
        fewer, more = sorted((self.world, noise_samples))
        if batch % more or more % fewer:
            raise RecipeError(
                f"train.batch {batch} with train.noise_samples {noise_samples} cannot be divided equally among "
                f"{self.world} processes; make both multiples of {self.world}, or start another number of processes"
            )

    def parts(self, windows_BT: Tensor, noise_samples: int, micro_batch: int) -> list[tuple[int, Tensor]]:
        """This process's micro-batches of a step, each with the number of its noise sample; none has two."""
        share = len(windows_BT) // self.world
        start, stop = self.rank * share, (self.rank + 1) * share
        per_sample = len(windows_BT) // noise_samples
        parts = []
        for sample in range(noise_samples):
            mine_BT = windows_BT[max(start, sample * per_sample) : min(stop, (sample + 1) * per_sample)]
            parts += [(sample, ids_BT) for ids_BT in mine_BT.split(micro_batch) if len(ids_BT)]
        return parts

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.world == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def any(self, here: bool) -> bool:
        """Whether it holds in any process; the same answer in all of them."""
        return bool(self.total(torch.tensor(float(here))) > 0)

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world > 1:
            dist.barrier(self.waiting)

    def broadcast(self, find: Callable[[], str]) -> str:
        """What process 0 finds, which may take it long; the others do not look."""
        box = [find() if self.first else ""]
        if self.world > 1:
            dist.broadcast_object_list(box, group=self.waiting)
        return box[0]

    @contextmanager
    def first_leads(self) -> Iterator[None]:
        """A section that process 0 goes through before the others, which then find what it has made."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


def is_first() -> bool:
    """Whether this is process 0 of those that `torchrun` started, or the only one; known before they have joined."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


ALONE = Group()
"""One process on the CPU."""


@contextmanager
def joined(device: str, shard: bool) -> Iterator[Group]:
    """The group this process was started into by `torchrun`, or a group of one.

    `device` "cuda" becomes this process's own GPU. A process that fails leaves without a word to the others, which
    might be waiting for it: `torchrun` stops them. Raises `RecipeError` for `shard` without `torchrun`.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if shard:
            raise RecipeError(
                "`shard` splits a run over processes; start it with torchrun --nproc-per-node N -m maskgen"
            )
        yield Group(device=device)
        return
    kind = torch.device(device).type
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield Group(dist.get_rank(), dist.get_world_size(), device, shard, waiting)
    dist.destroy_process_group()
