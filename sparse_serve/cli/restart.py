"""Starts a server again whose engine was lost: the same command takes the place of this process.

Nothing of the lost engine's life can be in the way then, and the process keeps its id, its terminal and whoever
started it. Its ports are free for the seconds until the new program has bound them.
"""

import logging
import os
import signal
import sys

from sparse_serve.cli.terminal import Terminal
from sparse_serve.runtime import environment

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether somebody has asked this server to end, as a signal too: such a server does not start again."""

    def __init__(self) -> None:
        self.is_made = False

    def __call__(self, *signal_and_frame: object) -> None:
        """A signal has come."""
        self.is_made = True


def if_allowed(most: int, shown: Terminal) -> None:
    """Start again, which does not return, unless that was done `most` times."""
    done = environment.restarts()
    if done >= most:
        return
    said = f"starting again ({done + 1} of {most})"
    logger.warning("%s", said)
    shown.note(said)
    environment.set_restarts(done + 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    logging.shutdown()
    shown.restore()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
