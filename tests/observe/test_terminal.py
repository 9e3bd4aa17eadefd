"""A progress bar is for a terminal at the end of mpirun's output, whatever mpirun gives its ranks."""

from __future__ import annotations

import os
import pty
import subprocess

import pytest
from launching import clean_environment, command

SCRIPT = "from mpitrain.observe.terminal import terminal_width; print('width', terminal_width())"


@pytest.mark.parametrize("ranks", [0, 1])
def test_output_into_a_pipe_is_no_terminal(ranks, tmp_path):
    done = subprocess.run(
        command(ranks, "-c", SCRIPT), cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["width", "None"], done.stderr


@pytest.mark.parametrize("ranks", [0, 1])
def test_a_terminal_is_seen_through_mpirun(ranks, tmp_path):
    master, terminal = pty.openpty()
    os.set_inheritable(terminal, True)
    subprocess.run(["stty", "cols", "97"], stdin=terminal, check=True, timeout=10)
    process = subprocess.Popen(
        command(ranks, "-c", SCRIPT), cwd=tmp_path, env=clean_environment(), stdout=terminal, stderr=subprocess.DEVNULL
    )
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    assert os.read(master, 1000).split()[:2] == [b"width", b"97"]
    os.close(master)
