"""Starts a server again whose engine was lost: the same command takes the place of this process.

Nothing of the lost engine's life can be in the way then, and the process keeps its id, its terminal and whoever
started it. Its ports are free for the seconds until the new program has bound them.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from sparse_serve.cli.terminal import Terminal
from sparse_serve.runtime import environment, processes
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.server.settings import Settings

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether somebody has asked this server to end, as a signal too: such a server does not start again."""

    def __init__(self) -> None:
        self.is_made = False

    def __call__(self, *signal_and_frame: object) -> None:
        """A signal has come."""
        self.is_made = True


_FILES = ("api_keys", "admin_keys", "tls_cert", "tls_key", "tls_client_ca")
"""Settings that name a file which is read at the start."""


def prepare(settings: Settings) -> None:
    """Be able to start again, and clear away what the program before this one has left, if there was one.

    Raises `SettingsError` for a pipe in place of a file (`<(command)` in a shell), which the next program could not
    read again.
    """
    if environment.restarts():
        processes.reap()
    for name in _FILES if settings.restarts else ():
        file = getattr(settings, name)
        if file and Path(file).is_fifo():
            raise SettingsError(
                f"--restarts {settings.restarts} with --{name.replace('_', '-')} {file}: a pipe, which cannot be read "
                "again; expected a file"
            )


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
