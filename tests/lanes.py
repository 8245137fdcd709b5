"""Which process of `make test` runs which file, and when.

xdist's `loadfile` begins with the files of most tests, and gives a process its next file while the last two tests of
the one before are to be done. Here the files of fewest tests are the longest, up to minutes each: at the end one
process had three of them before it, and the other nothing.
"""

from __future__ import annotations

from xdist.scheduler.loadfile import LoadFileScheduling
from xdist.workermanage import WorkerController

ENGINES = ("tests/vllm/", "tests/deploy/")
"""Where tests start engines and servers. Two that start at a time want four cores, and each waits for the other."""


class Lanes(LoadFileScheduling):
    """Whole files, those of fewest tests first; what starts engines is for the first process, the rest for the others.

    Who has nothing left of its own helps.
    """

    def _assign_work_unit(self, node: WorkerController) -> None:
        has_engines = node.gateway.id == "gw0"
        own = [file for file in self.workqueue if file.startswith(ENGINES) == has_engines]
        chosen = min(own or self.workqueue, key=lambda file: len(self.workqueue[file]))
        self.workqueue.move_to_end(chosen, last=False)
        super()._assign_work_unit(node)
