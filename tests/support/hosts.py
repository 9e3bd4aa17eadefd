"""Hosts emulated on this machine: own name, network, processes and shared memory each, on links with a rate.

A host is a set of Linux namespaces that one sleeping process holds; the switch, from where `mpirun` starts, is another.
They are joined by pairs of virtual interfaces which are made inside these namespaces: the machine's own network is
neither used nor changed. When the holder ends, so does all that runs on the host, and the kernel takes the rest away; a
holder ends with the process that made it, however that ends. Cores, files and memory are the machine's.

    python tests/support/hosts.py    # says what keeps this machine from it, and then exits with 1
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from launching import BIN

SWITCH = "switch"
SECONDS = 20  # for any one command here, all of which take milliseconds
NAMESPACES = ("--net", "--uts", "--ipc", "--mount")
PREPARE = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && mount --bind "$1" /etc/hosts && ip link set lo up'
# What mpirun takes for ssh: [OPTION...] HOST COMMAND... Hosts share /tmp, and their process ids are the same: what a
# daemon names after its own would not be its own there.
AGENT = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
case $1 in {cases} *) echo "no host $1" >&2; exit 1 ;; esac
shift
export TMPDIR=/dev/shm
exec nsenter --target $pid {namespaces} --pid -- sh -c "$*"
"""


class Hosts:
    """Hosts host1, host2, ... on one switch; a context manager, after which there is nothing left of them."""

    def __init__(self, count: int, rate: str = "1gbit") -> None:
        """So many hosts, with links of `rate` (as tc has it) in both directions."""
        self.names = [f"host{number}" for number in range(1, count + 1)]
        self.rate = rate
        self._holders: dict[str, int] = {}
        self._keepers: set[int] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Hosts:
        """Raises OSError, with what the failed command said."""
        with ExitStack() as stack:
            self._place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
            addresses = {name: f"10.77.0.{number}" for number, name in enumerate([SWITCH, *self.names], 1)}
            lines = [f"{address} {name}\n" for name, address in addresses.items()]
            (self._place / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
            self._hold(stack, SWITCH)
            self._on(SWITCH, "ip", "link", "add", "bridge", "type", "bridge")
            self._on(SWITCH, "ip", "address", "add", f"{addresses[SWITCH]}/24", "dev", "bridge")
            self._on(SWITCH, "ip", "link", "set", "bridge", "up")
            for name in self.names:
                self._hold(stack, name)
                self._join(name, addresses[name])
            cases = " ".join(f"{name}) pid={self._holders[name]} ;;" for name in self.names)
            self._agent = self._place / "agent"
            self._agent.write_text(AGENT.format(cases=cases, namespaces=" ".join(NAMESPACES)))
            self._agent.chmod(0o755)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _hold(self, stack: ExitStack, name: str) -> None:
        """Start the process whose namespaces are a host's; all processes of a host end with it."""
        # Not for the switch, whose mpirun must find the holders of the hosts.
        own = () if name == SWITCH else ("--pid", "--fork", "--kill-child", "--mount-proc")
        prepare = ("sh", "-c", f"{PREPARE} && echo ready && exec sleep infinity", name, str(self._place / "hosts"))
        holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, *own, *prepare],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        stack.callback(_end, holder)
        said = holder.stdout.readline()
        if said != "ready\n":
            raise OSError(said.strip() or "unshare ended without a word")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        self._holders[name] = int(children.read_text().split()[0]) if own else holder.pid
        self._keepers |= {holder.pid, self._holders[name]}

    def _join(self, name: str, address: str) -> None:
        """Connect a host to the switch, at the rate in both directions; the other end is named like the host."""
        peer = ("type", "veth", "peer", "name", "eth0", "netns", str(self._holders[name]))
        self._on(SWITCH, "ip", "link", "add", name, *peer)
        self._on(SWITCH, "ip", "link", "set", name, "master", "bridge", "up")
        self._on(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        self._on(name, "ip", "link", "set", "eth0", "up")
        # Bursts of a millisecond at 1 Gbit/s.
        queue = ("root", "tbf", "rate", self.rate, "burst", "125000", "latency", "50ms")
        self._on(name, "tc", "qdisc", "add", "dev", "eth0", *queue)
        self._on(SWITCH, "tc", "qdisc", "add", "dev", name, *queue)

    def _on(self, name: str, *command: str) -> None:
        """Change the network of a host."""
        enter = ("nsenter", "--target", str(self._holders[name]), "--net", "--")
        done = subprocess.run([*enter, *command], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")

    def cut(self, name: str) -> None:
        """Pull a host's cable: what is sent is lost, and nobody is told."""
        self._on(SWITCH, "ip", "link", "set", name, "down")

    def heal(self, name: str) -> None:
        """Put it back."""
        self._on(SWITCH, "ip", "link", "set", name, "up")

    def processes(self, name: str) -> list[int]:
        """Process ids, as this machine counts, of all that runs on a host but for its holder."""
        network = _network_of(self._holders[name])
        pids = (int(place.name) for place in Path("/proc").glob("[0-9]*"))
        return [pid for pid in pids if _network_of(pid) == network and pid not in self._keepers]

    def command(self, ranks: Sequence[int], *arguments: str, cwd: Path) -> list[str]:
        """A command line: this Python on so many ranks of each host, under this environment's mpirun, in `cwd`."""
        mpirun = str(BIN / "mpirun")
        where = ",".join(f"{name}:{count}" for name, count in zip(self.names, ranks, strict=False) if count)
        version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
        if "HYDRA" in version:
            how = ["-localhost", SWITCH, "-launcher", "ssh", "-launcher-exec", str(self._agent), "-hosts", where]
        else:
            how = ["--prtemca", "plm_ssh_agent", str(self._agent), "--bind-to", "none", "--host", where]
        enter = ["nsenter", "--target", str(self._holders[SWITCH]), *NAMESPACES, "--", "env", "--chdir", str(cwd)]
        return [*enter, mpirun, *how, "-n", str(sum(ranks)), sys.executable, *arguments]


def _network_of(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/ns/net").readlink()
    except OSError:  # it has just ended
        return None


def _end(holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait(SECONDS)
    holder.stdout.close()


def obstacle() -> str:
    """What keeps this machine from emulating hosts, if anything does."""
    if os.geteuid() != 0:
        return "hosts are emulated by root only"
    missing = [name for name in ("ip", "tc", "unshare", "nsenter", "setpriv") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here (Debian: apt install iproute2 util-linux)"
    try:
        with Hosts(1):
            return ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"namespaces or links cannot be made here: {error}"


if __name__ == "__main__":
    found = obstacle()
    print(found)
    sys.exit(bool(found))
