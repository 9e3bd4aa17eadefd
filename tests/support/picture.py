"""A picture of what a command shows on a terminal, as SVG: `python tests/support/picture.py out.svg 100 8 mpirun ...`.

The word `light` before the command draws a terminal with a white ground. Runs the command on a pseudo-terminal of so
many columns for at most so many seconds, plays what it writes as a terminal would, as far as our output needs it
(carriage return, erase a line, a line up), and draws what is there at the end.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from rich.text import Text


def watch(command: list[str], columns: int, seconds: float) -> str:
    """What the command has written by then; it is asked to stop if it has not ended."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([ours], [], [], left)[0]:
            try:
                written += os.read(ours, 1 << 16)
            except OSError:  # it has ended
                break
    process.send_signal(signal.SIGUSR1)
    os.close(ours)
    process.wait()
    return written.decode(errors="replace")


def play(written: str) -> list[str]:
    """Lines of the screen, colours still in them."""
    lines, row = [""], 0
    for piece in re.split(r"(\r?\n|\r|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh])", written):
        if piece.endswith("\n"):
            row += 1
            lines += [""] * (row == len(lines))
        elif piece in ("\r", "\x1b[2K"):
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d*)A", piece):
            row = max(0, row - int(up[1] or 1))
        elif not piece.startswith("\x1b[?"):
            lines[row] += piece
    return lines


def main() -> None:
    out, columns, seconds, *command = sys.argv[1:]
    light = command[0] == "light"
    command = command[light:]
    lines = play(watch(command, int(columns), float(seconds)))
    console = Console(record=True, width=int(columns), file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, overflow="crop")
    shown = [word if "/" not in word else Path(word).name for word in command]
    console.save_svg(out, title=" ".join(shown), theme=DEFAULT_TERMINAL_THEME if light else SVG_EXPORT_THEME)


if __name__ == "__main__":
    main()
