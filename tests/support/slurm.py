"""A private Slurm of several virtual nodes on this machine: real daemons, with a key, ports and a folder of their own.

Its nodes have the machine's name, cores and files; MPI takes them for different ones all the same, and so does whoever
asks for SLURMD_NODENAME. Nothing is confined, and nothing of a Slurm that the machine may have is touched. Daemons end
with the process that made them, however that ends.

    python tests/support/slurm.py    # says what keeps this machine from it, and then exits with 1
"""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from launching import clean_environment

PACKAGES = "Debian: apt-get install --no-install-recommends slurm-wlm munge"
SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
SECONDS = 30  # for a daemon to be up or gone, or a command to answer
# A requeued job waits until the credentials of its last start have expired: 2 minutes by default.
CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
FirstJobId={first}
AuthInfo=socket={place}/munge.socket,cred_expire=10
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
KillWait=10
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN\n"


class Slurm:
    """Nodes n1, n2, ... that jobs can be submitted to; a context manager, after which there is nothing left of them."""

    def __init__(self, nodes: int = 2, cpus: int = 4) -> None:
        """So many nodes, each with `cpus`, which may be more than there are."""
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.cpus = cpus

    def __enter__(self) -> Slurm:
        """Raises OSError, with what the daemons said."""
        with ExitStack() as stack:
            self._place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
            self._place.chmod(0o755)  # or munged refuses to serve others
            self._configure()
            key = self._place / "munge.key"
            key.touch(0o600)
            key.write_bytes(os.urandom(1024))
            files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
            told = [f"--{flag}={self._place / f'munge.{name}'}" for flag, name in files.items()]
            self._start(stack, "munged", "--foreground", *told)
            _wait_for(lambda: (self._place / "munge.socket").exists(), "munged is not up", self._log)
            self._start(stack, "slurmctld", "-D")
            for name in self.names:
                self._start(stack, "slurmd", "-D", "-N", name)
            stack.callback(self._cancel_all)
            _wait_for(self._all_idle, "not all nodes are up", self._log)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _configure(self) -> None:
        host, ports = platform.node().partition(".")[0], _free_ports(1 + len(self.names))
        # MPICH names its shared memory after job and step, and that of a killed job stays: never twice the same number.
        first = random.randrange(1, 2**25)
        text = CONFIGURATION.format(host=host, place=self._place, ports=ports, first=first)
        for name, port in zip(self.names, ports[1:], strict=True):
            text += NODE.format(name=name, host=host, port=port, cpus=self.cpus)
            (self._place / f"spool-{name}").mkdir()
        (self._place / "state").mkdir(0o700)
        (self._place / "slurm.conf").write_text(text)
        self.environment = clean_environment(
            SLURM_CONF=str(self._place / "slurm.conf"),
            PATH=SYSTEM_PATH,
            MPIR_CVAR_CH4_NETMOD="ofi",  # UCX's addresses are so long that Slurm's PMI-2 now and then cuts one
        )
        # There is no word for no cgroups before 24.05; the plug-in for version 1 is idle, since no other asks for it.
        year, month = map(int, re.findall(r"\d+", self.ask("slurmd", "-V"))[:2])
        plugin = "disabled" if (year, month) >= (24, 5) else "cgroup/v1"
        (self._place / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")

    def _start(self, stack: ExitStack, *command: str) -> None:
        """A daemon, in the foreground, until the stack closes."""
        with (self._place / "log").open("a") as log:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        stack.callback(_end, daemon)

    def _log(self) -> str:
        return "\n".join((self._place / "log").read_text().splitlines()[-20:])

    def _all_idle(self) -> bool:
        try:
            return self.ask("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(self.names)
        except OSError:  # slurmctld does not answer yet
            return False

    def _cancel_all(self) -> None:
        """Steps that are left would outlive their daemons."""
        for job in self.ask("squeue", "--noheader", "--format=%A").split():
            self.ask("scancel", job)
        _wait_for(lambda: not self.ask("squeue", "--noheader") and self._all_idle(), "jobs do not end", self._log)

    def ask(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What one of Slurm's commands prints; OSError if it fails."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=SECONDS
        )
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def submit(self, script: Path, *arguments: str, cwd: Path, **environment: str) -> str:
        """The id of a new job."""
        return self.ask("sbatch", "--parsable", str(script), *arguments, cwd=cwd, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """All that Slurm knows of a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "--oneliner", "show", "job", number)))


def _free_ports(count: int) -> list[int]:
    """Of those that no outgoing connection is given: it would be there before the daemon."""
    free: set[int] = set()
    while len(free) < count:
        port = random.randrange(10000, 32768)
        with suppress(OSError), socket.create_server(("", port)):
            free.add(port)
    return sorted(free)


def _wait_for(condition: Callable[[], bool], otherwise: str, log: Callable[[], str]) -> None:
    limit = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > limit:
            raise OSError(f"{otherwise} after {SECONDS} s\n{log()}")
        time.sleep(0.2)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait(SECONDS)


def obstacle() -> str:
    """What keeps this machine from it, if anything does."""
    if os.geteuid() != 0:
        return "a private Slurm is started by root only"
    commands = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
    missing = [name for name in commands if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"no {', '.join(missing)} here ({PACKAGES})"
    try:
        with Slurm(1):
            return ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Slurm cannot be started here: {error}"


if __name__ == "__main__":
    found = obstacle()
    print(found)
    sys.exit(bool(found))
