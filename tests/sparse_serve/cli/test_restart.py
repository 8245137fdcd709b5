"""What a server needs to start again. That it does is tested on a real engine."""

import os
from pathlib import Path

import pytest

from sparse_serve.cli import restart
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.server.settings import Settings


def test_a_pipe_in_place_of_a_file_cannot_be_read_again(tmp_path: Path) -> None:
    pipe = tmp_path / "keys"
    os.mkfifo(pipe)
    restart.prepare(Settings(api_keys=str(pipe)))
    with pytest.raises(SettingsError, match=f"--restarts 1 with --api-keys {pipe}: a pipe, .*expected a file"):
        restart.prepare(Settings(api_keys=str(pipe), restarts=1))
    restart.prepare(Settings(api_keys=str(tmp_path / "none"), restarts=1))
