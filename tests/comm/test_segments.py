"""Segments through host memory: no buffer is handed to MPI while a copy from or to it still runs."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI
from small import train_small

from mpitrain.comm import ring, segments
from mpitrain.comm.buffers import Transport

pytestmark = pytest.mark.mpi(min_size=1)


class Late:
    """A copy that is made at the third look at its event, as a busy device would."""

    def __init__(self, host, tensor, stream, written):
        self.host, self.tensor, self.looks = host.fill_(torch.nan), tensor, 0

    def query(self):
        self.looks += 1
        if self.looks == 3:
            self.host.copy_(self.tensor)
        return self.looks >= 3


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_a_segment_is_not_sent_before_its_copy_to_the_host_has_ended(comm, monkeypatch, wire):
    monkeypatch.setattr(segments, "start_copy", Late)
    monkeypatch.setattr(ring, "SEGMENT", 64)
    flat = torch.arange(3001.0).remainder(16) + comm.rank
    ring.AllReduce(comm, flat, Transport(direct=False, patient=True), wire)()
    assert torch.equal(flat, torch.arange(3001).remainder(16) * float(comm.size) + comm.size * (comm.size - 1) / 2)


@dataclass(frozen=True)
class Marking(Transport):
    """Every event writes down when it is waited for."""

    log: tuple[list[str]] = ([],)

    def mark(self):
        self.log[0].append("copy")
        return SimpleNamespace(synchronize=lambda: self.log[0].append("copied"))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_buffer_is_not_filled_anew_before_its_copy_to_the_device_has_ended(comm, in_place):
    log: list[str] = []

    class Noting:
        rank, size, Isend = 0, 1, MPI.COMM_SELF.Isend

        def Irecv(self, *arguments):
            log.append("receive")
            return MPI.COMM_SELF.Irecv(*arguments)

    sent = torch.arange(60.0)
    targets = list(torch.zeros(60).split(10))
    outbox = segments.Outbox(Noting(), Transport())
    transport = Marking(direct=False, log=(log,))
    idle = SimpleNamespace(go_on=lambda: True)
    landing = None if in_place else segments.Landing()
    parts = [segments.Part.of(target) for target in targets]
    inbox = segments.StagedInbox(Noting(), transport, parts, sent.dtype, landing, idle)
    inbox.begin()
    for number, segment in enumerate(sent.split(10)):
        outbox.send(segments.Part.of(segment))
        assert torch.equal(inbox.next(), segment)
        assert torch.equal(targets[number], segment if in_place else torch.zeros(10))
    outbox.wait()
    ahead, again = segments.RECEIVES_AHEAD, ["copied", "receive", "copy"]
    assert log == ["receive"] * ahead + ["copy"] + again * (6 - ahead) + ["copy"] * (ahead - 1)


def test_two_segments_are_staged_at_a_time_and_all_leave_in_order(comm):
    sent, received = [], [False]

    class Slow:
        rank, size = 0, 1

        def Isend(self, message, rank, tag):
            sent.append(torch.frombuffer(bytearray(message[0]), dtype=torch.float32).tolist())
            return SimpleNamespace(Test=lambda: received[0])

    outbox = segments.StagedOutbox(Slow(), Transport(direct=False))
    for segment in torch.arange(10.0).split(2):
        outbox.send(segments.Part.of(segment))
    assert sent == [[0, 1], [2, 3]]
    received[0] = True
    outbox.wait()
    assert sent == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("most_stages", [1, 4])
def test_training_with_staged_tensors_gives_the_same_bits(comm, most_stages, reproducible):
    pipe = max(stages for stages in range(1, most_stages + 1) if comm.size % stages == 0)
    options = {"algorithm": "auto" if reproducible else "ring", "reproducible": reproducible}
    plain, staged = (train_small(comm, comm.size // pipe, pipe, 2, direct=way, **options) for way in (True, False))
    assert staged.losses == plain.losses
    assert staged.grad_norms == plain.grad_norms
