"""What a reduction may not rest on: messages that MPI takes before they are received, and ranks that live."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from launching import finish, mpirun, start
from tiny import processes_of

TESTS = Path(__file__).parent
SECONDS = 30
# Each library heeds its own. MPICH's cells hold a header of 64 bytes too; Open MPI's shared memory has no such switch.
SMALL_EAGER_LIMIT = {
    "MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_CELL_SIZE": "128",
    "OMPI_MCA_btl": "self,tcp",
    "OMPI_MCA_btl_tcp_if_include": "lo",
    "OMPI_MCA_btl_tcp_eager_limit": "80",
}
# Whether a plain send of 100 bytes, less than any chunk of a bucket, waits for a receive that comes a second late.
PROBE = """
import time
from mpi4py import MPI
world, data, began = MPI.COMM_WORLD, bytearray(100), time.monotonic()
if world.rank == 0:
    world.Barrier(), world.Send([data, MPI.BYTE], 1)
    print("late" if time.monotonic() - began > 1 else "eager")
else:
    world.Barrier(), time.sleep(1), world.Recv([data, MPI.BYTE], 0)
"""
KILLED, LEFT = "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)"
# Rank 1 dies while it reduces: rank 0 comes to the second reduction too late for it.
DEATH = """
import os, signal, threading, time
import torch
from mpitrain.comm.buckets import Bucket
from mpitrain.comm.buffers import Transport
from mpitrain.comm.choice import choose_exchange
from mpitrain.comm.reducer import GradientReducer
from mpitrain.runtime import launch
from mpitrain.runtime.watchdog import Watch

world = launch.start()
watch = Watch(world, lambda error: launch.abort(world, error, None))
buckets = [Bucket([("values", torch.nn.Parameter(torch.zeros(100_000)))])]
exchange, _ = choose_exchange(world, world, Transport(patient=True), buckets, torch.float32, algorithm="{algorithm}")
reducer = GradientReducer(exchange)
for step in range(2):
    world.Barrier()
    reducer.start_step(1)
    if step == 1 and world.rank == 0:
        time.sleep(60)
    if step == 1 and world.rank == 1:
        threading.Timer(1.0, lambda: (open("died", "x"), {death})).start()
    reducer.finish()
open(f"survived-{{world.rank}}", "x")
"""


def test_reductions_pass_where_next_to_nothing_is_sent_eagerly(tmp_path):
    probe = mpirun(2, "-c", PROBE, cwd=tmp_path, **SMALL_EAGER_LIMIT)
    assert probe.stdout.strip() == "late", f"the variables do nothing here: {probe.stdout}{probe.stderr}"
    files = [str(TESTS / name) for name in ("comm/test_stress.py", "pipeline/test_executor.py")]
    options = ("-m", "pytest", "--only-mpi", "-p", "no:cacheprovider", *files)
    done = mpirun(3, *options, cwd=tmp_path, timeout=300, **SMALL_EAGER_LIMIT)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert " passed" in done.stdout, done.stdout


@pytest.mark.parametrize("algorithm, death", [*((name, KILLED) for name in ("ring", "node", "native")), ("ring", LEFT)])
def test_a_rank_that_dies_inside_a_reduction_ends_the_job_on_all_ranks(tmp_path, algorithm, death):
    mark = {"TEST_MARK": f"death-{algorithm}-{os.getpid()}"}
    process = start(3, "-c", DEATH.format(algorithm=algorithm, death=death), cwd=tmp_path, **mark)
    limit = time.monotonic() + 90
    while not (tmp_path / "died").exists():
        assert process.poll() is None and time.monotonic() < limit, finish(process, 1)
        time.sleep(0.02)
    done = finish(process, SECONDS)
    assert done.returncode != 0, done.stdout + done.stderr
    assert list(tmp_path.glob("survived-*")) == [], "it died before or after the reduction"
    limit = time.monotonic() + SECONDS
    while left := processes_of(f"TEST_MARK={mark['TEST_MARK']}"):
        assert time.monotonic() < limit, left
        time.sleep(0.1)
