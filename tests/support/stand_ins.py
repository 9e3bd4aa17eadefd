"""Stand-ins for the commands of schedulers: they write down what is asked of them, and start the real launcher.

The folder of an `Act` holds one program under all their names. `srun`, `mpiexec`, `mpirun`, `jsrun`, `flux run` and
`flux exec` start the command that they are given under this environment's mpirun, as often as their options say, and
pass USR1 on, as real ones do. What asks for another start (`scontrol`, `qsub`, `flux --parent batch`) only writes it
down; `squeue`, `qstat`, `bjobs` and `flux job timeleft` say that ten minutes are left.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from launching import BIN, LAUNCHERS, begin, finish

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("srun", "scontrol", "squeue", "qsub", "qstat", "bjobs", "mpiexec", "mpirun", "jsrun", "flux")
ANSWERS = {
    "squeue": "10:00",
    "qstat": "Job Id: 7\n    Resource_List.walltime = 00:10:00",
    "bjobs": "0:10 L",
    "flux job timeleft": "600",
}
COUNTS = ("-n", "-np", "--nrs", "--ntasks")
VARIABLES = {
    "slurm": {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1", "SLURM_NTASKS": "4"},
    "pbs": {"PBS_JOBID": "7", "OMP_NUM_THREADS": "1"},
    "lsf": {"LSB_JOBID": "7"},
    "flux": {"FLUX_JOB_ID": "7"},
}
# Stands for Python: tells its arguments, may wait for a signal, may leave a code in the run directory, and leaves with
# one of the test's choice.
PROGRAM = """#!/bin/bash
printf '%s\\0' "$@" >"$ACT/argv.${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}}"
if [ -n "${SIGNALS:-}" ]; then
    trap 'SIGNALS=$((SIGNALS - 1))' USR1
    : >"$ACT/ready.${PMI_RANK:-${OMPI_COMM_WORLD_RANK:-0}}"
    while [ "$SIGNALS" -gt 0 ]; do sleep 0.05; done
fi
[ -z "${TOLD:-}" ] || { printf '{\\n "code": %s,\\n "reason": "told"\\n}\\n' "$TOLD" >exit.$$ && mv exit.$$ exit.json; }
exit "${CODE:-0}"
"""


@dataclass
class Act:
    """One job after the other of a script, in a folder of their own.

    Attributes:
        scheduler: slurm, pbs, lsf or flux.
        hosts: of each rank, as PBS has them.
    """

    place: Path
    scheduler: str
    hosts: tuple[str, ...] = ("node1",) * 2 + ("node2",) * 2

    def __post_init__(self) -> None:
        self.folder, self.log = self.place / "bin", self.place / "log"
        self.folder.mkdir()
        for name, text in {**dict.fromkeys(NAMES, f"#!{sys.executable}\n{STAND_IN}"), "program": PROGRAM}.items():
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        (self.place / "nodes").write_text("".join(f"{host}\n" for host in self.hosts))

    def script(self, **variables: str) -> Path:
        """The shelf's script for 2 nodes of 2 ranks, with other lines in its site part."""
        text = (ROOT / "jobs" / f"{self.scheduler}.sh").read_text()
        values = {"python": str(self.folder / "program"), "per_node": "2", "ranks": "4"} | variables
        for name, value in values.items():
            text = re.sub(rf"^{name}=(\(\)|[\w/]*)(?= |$)", lambda _, line=f"{name}={value}": line, text, flags=re.M)
        file = self.place / "job script.sh"
        file.write_text(text)
        return file

    def begin(self, script: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start a job as the scheduler would."""
        here = {"ACT": str(self.place)}
        if self.scheduler == "pbs":
            here |= {"PBS_O_WORKDIR": str(self.place), "PBS_NODEFILE": str(self.place / "nodes")}
        path = f"{self.folder}:{os.environ['PATH']}"
        environment = VARIABLES[self.scheduler] | here | {"PATH": path} | environment
        return begin(["bash", str(script), *arguments], self.place, **environment)

    def end(self, process: subprocess.Popen[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """What has come of it, in standard output too what LSF's script writes to its file."""
        done = finish(process, timeout)
        file = self.place / "mpitrain-7.out"
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout + (file.read_text() if file.exists() else ""), done.stderr
        )

    def run(self, script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.end(self.begin(script, *arguments, **environment))

    def asked(self) -> list[list[str]]:
        """Each command with its arguments, in order."""
        return self._told("asked")

    def signals(self) -> int:
        """How often USR1 has come to a launcher."""
        return len(self._told("USR1"))

    def _told(self, kind: str) -> list[Any]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [value for found, value in map(json.loads, lines) if found == kind]

    def next_job(self, script: Path, code: int) -> list[str] | None:
        """The script and the arguments of the start that follows one which has left with `code`; None if none does."""
        asked = [words for words in self.asked() if words[0] in ("scontrol", "qsub") or "batch" in words]
        if self.scheduler == "lsf":
            assert not asked
            codes = re.findall(r"^#BSUB -Q (.*)$", script.read_text(), re.M)
            return [str(script)] if codes == [str(code)] else None
        if not asked:
            return None
        (words,) = asked
        if self.scheduler == "slurm":
            assert words == ["scontrol", "requeue", "7"]
            return [str(script)]
        verb = {"pbs": ["qsub"], "flux": ["flux", "--parent", "batch"]}[self.scheduler]
        assert words[: len(verb)] == verb
        return words[len(verb) :]

    def argv(self) -> list[list[str]]:
        """What each rank of the program was told."""
        return [file.read_text().split("\0")[:-1] for file in sorted(self.place.glob("argv.*"))]


def play(name: str, words: list[str]) -> int:
    """What a stand-in does."""
    place = Path(os.environ["ACT"])

    def note(kind: str, value: object) -> None:
        with (place / "log").open("a") as log:
            log.write(json.dumps([kind, value]) + "\n")

    for command, answer in ANSWERS.items():
        if shlex.join([name, *words]).startswith(command):
            print(answer)
            return 0
    note("asked", [name, *words])
    if name in ("scontrol", "qsub") or "batch" in words[:2]:
        return int(os.environ.get("REFUSE", "0"))
    start = next(number for number, word in enumerate(words) if re.search("(^|/)(program|bash|python[0-9.]*)$", word))
    options = dict(pairwise(words[: start + 1]))
    options |= dict(word.split("=", 1) for word in words[:start] if "=" in word)
    count = next((options[flag] for flag in COUNTS if flag in options), os.environ.get("SLURM_NTASKS", "2"))
    count = str(int(count) * int(options.get("--tasks_per_rs", 1)))
    mine = {variable: value for variable, value in os.environ.items() if not variable.startswith((*LAUNCHERS, "PBS"))}
    launcher = subprocess.Popen([str(BIN / "mpirun"), "-np", count, *words[start:]], env=mine)

    def pass_on(number: int, frame: object) -> None:
        note("USR1", name)
        launcher.send_signal(number)

    signal.signal(signal.SIGUSR1, pass_on)
    return launcher.wait()


STAND_IN = f"""import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from stand_ins import play
sys.exit(play(sys.argv[0].rpartition("/")[2], sys.argv[1:]))
"""
