"""Play all stages of a schedule against each other on paper: does it end, how long does it take, what does it hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mpitrain.pipeline.schedule import Instruction, Kind


class ScheduleError(ValueError):
    """The programs of the stages do not fit together."""


@dataclass(frozen=True)
class Span:
    """One FORWARD or BACKWARD, from `start` to `stop`, in the unit of the times given to `play`."""

    instruction: Instruction
    start: float
    stop: float


@dataclass(frozen=True)
class Proof:
    """What a schedule costs. Lists have one entry per stage; times are in the unit of the times given to `play`."""

    peak_live: list[int]  # most micro-batches whose forward is done and whose backward is still to come
    busy: list[float]
    makespan: float
    spans: list[list[Span]]  # every FORWARD and BACKWARD, in order

    @property
    def bubble(self) -> float:
        """Share of the makespan in which the average stage computes nothing."""
        return 1 - sum(self.busy) / len(self.busy) / self.makespan if self.makespan else 0.0


@dataclass(frozen=True, slots=True)
class _Message:
    """A message's identity: the same two stages and the same direction are told apart by micro-batch (MPI's tag)."""

    receiver: int
    is_activation: bool
    micro_batch: int

    def __str__(self) -> str:
        return f"{'activation' if self.is_activation else 'gradient'} {self.micro_batch} to stage {self.receiver}"


@dataclass
class _Stage:
    """Where one stage has got to."""

    program: tuple[Instruction, ...]
    forward_time: float
    backward_time: float
    clock: float = 0.0
    position: int = 0
    live: int = 0
    peak_live: int = 0
    spans: list[Span] = field(default_factory=list)
    computed: set[Instruction] = field(default_factory=set)
    sends: list[_Message] = field(default_factory=list)


class _Play:
    """All stages and the messages between them. Whose turn comes first does not matter: a stage waits, or goes on."""

    def __init__(self, stages: list[_Stage], num_micro_batches: int, train: bool, blocking_sends: bool) -> None:
        self.stages, self.train, self.blocking_sends = stages, train, blocking_sends
        kinds = (Kind.FORWARD, Kind.BACKWARD) if train else (Kind.FORWARD,)
        self.due = {Instruction(kind, micro_batch) for kind in kinds for micro_batch in range(num_micro_batches)}
        self.posted: dict[_Message, float] = {}  # at which time
        self.sent: dict[_Message, float] = {}
        self.received: set[_Message] = set()

    def run(self) -> None:
        while any([self.advance(number) for number in range(len(self.stages))]):  # noqa: C419 - every stage gets a turn
            pass
        blocked = [
            f"stage {number} waits at '{stage.program[stage.position]}'"
            for number, stage in enumerate(self.stages)
            if stage.position < len(stage.program)
        ]
        if blocked:
            raise ScheduleError(f"deadlock: {'; '.join(blocked)}")
        self.check_end()

    def advance(self, number: int) -> bool:
        """Carry out what can be carried out now; whether that was anything."""
        stage, start = self.stages[number], self.stages[number].position
        while stage.position < len(stage.program) and self.carry_out(number, stage.program[stage.position]):
            stage.position += 1
        return stage.position > start

    def carry_out(self, number: int, step: Instruction) -> bool:
        """One instruction of one stage; False when it has to wait."""
        stage = self.stages[number]
        match step.kind:
            case Kind.POST_ACTIVATION | Kind.POST_GRADIENT:
                message = self.message(number, number, step.kind is Kind.POST_ACTIVATION, step)
                self.require(message not in self.posted, number, step, "was posted before")
                self.posted[message] = stage.clock
            case Kind.RECEIVE_ACTIVATION | Kind.RECEIVE_GRADIENT:
                return self.receive(number, step)
            case Kind.SEND_ACTIVATION | Kind.SEND_GRADIENT:
                return self.send(number, step)
            case Kind.FORWARD | Kind.BACKWARD:
                self.compute(number, step)
            case Kind.DRAIN:
                if any(message not in self.posted for message in stage.sends):
                    return False
                stage.clock = max([stage.clock, *(self.posted[message] for message in stage.sends)])
        return True

    def receive(self, number: int, step: Instruction) -> bool:
        message = self.message(number, number, step.kind is Kind.RECEIVE_ACTIVATION, step)
        self.require(message in self.posted, number, step, "was not posted before")
        self.require(message not in self.received, number, step, "was received before")
        if message not in self.sent:
            return False
        self.stages[number].clock = max(self.stages[number].clock, self.sent[message])
        self.received.add(message)
        return True

    def send(self, number: int, step: Instruction) -> bool:
        stage, is_activation = self.stages[number], step.kind is Kind.SEND_ACTIVATION
        message = self.message(number, number + (1 if is_activation else -1), is_activation, step)
        made_by = Instruction(Kind.FORWARD if is_activation else Kind.BACKWARD, step.micro_batch)
        self.require(made_by in stage.computed, number, step, f"comes before '{made_by}'")
        self.require(message not in self.sent, number, step, "was sent before")
        if self.blocking_sends:
            if message not in self.posted:
                return False
            stage.clock = max(stage.clock, self.posted[message])
        self.sent[message] = stage.clock
        stage.sends.append(message)
        return True

    def compute(self, number: int, step: Instruction) -> None:
        stage, forward = self.stages[number], step.kind is Kind.FORWARD
        self.require(step in self.due, number, step, "is not part of this step")
        self.require(step not in stage.computed, number, step, "was computed before")
        if not forward:
            own = Instruction(Kind.FORWARD, step.micro_batch)
            self.require(own in stage.computed, number, step, f"comes before '{own}'")
        if number != (0 if forward else len(self.stages) - 1):
            came = _Message(number, forward, step.micro_batch) in self.received
            self.require(came, number, step, f"comes before its {'activation' if forward else 'gradient'}")
        start, stage.clock = stage.clock, stage.clock + (stage.forward_time if forward else stage.backward_time)
        stage.spans.append(Span(step, start, stage.clock))
        stage.computed.add(step)
        if self.train:
            stage.live += 1 if forward else -1
            stage.peak_live = max(stage.peak_live, stage.live)

    def message(self, number: int, receiver: int, is_activation: bool, step: Instruction) -> _Message:
        sender = receiver - 1 if is_activation else receiver + 1
        exists = 0 <= sender < len(self.stages) and 0 <= receiver < len(self.stages)
        self.require(exists, number, step, f"has no neighbour: there are {len(self.stages)} stages")
        return _Message(receiver, is_activation, step.micro_batch)

    def require(self, condition: bool, number: int, step: Instruction, problem: str) -> None:
        if not condition:
            raise ScheduleError(f"stage {number}: '{step}' {problem}")

    def check_end(self) -> None:
        """All stages came to their end: have they computed everything, and waited for every message."""
        for number, stage in enumerate(self.stages):
            missing = sorted(map(str, self.due - stage.computed))
            if missing:
                raise ScheduleError(f"stage {number}: never computed: {', '.join(missing)}")
            if not stage.program or stage.program[-1].kind is not Kind.DRAIN:
                raise ScheduleError(f"stage {number}: the program does not end with '{Kind.DRAIN.value}'")
        left = sorted(map(str, (self.posted.keys() | self.sent.keys()) - self.received))
        if left:
            raise ScheduleError(f"posted or sent, but never received: {', '.join(left)}")


def play(
    programs: Sequence[tuple[Instruction, ...]],
    num_micro_batches: int,
    *,
    train: bool = True,
    forward_time: float | Sequence[float] = 1.0,
    backward_time: float | Sequence[float] = 2.0,
    blocking_sends: bool = True,
) -> Proof:
    """Play the programs of stages 0, 1, ... against each other; messages take no time, waiting for them does.

    With `blocking_sends` a send holds its stage until the neighbour has posted the receive, as MPI_Ssend does; else
    only DRAIN waits for that. What passes both ways relies on no buffering by MPI. Times are one number for all
    stages, or one per stage.

    Raises:
        ScheduleError: the programs deadlock, leave a message without its counterpart, compute before what they need
            is there, or do not compute every micro-batch exactly once (forward, and backward if `train`).
    """
    num_stages = len(programs)
    forward_times = [forward_time] * num_stages if isinstance(forward_time, int | float) else forward_time
    backward_times = [backward_time] * num_stages if isinstance(backward_time, int | float) else backward_time
    stages = [_Stage(*parts) for parts in zip(programs, forward_times, backward_times, strict=True)]
    _Play(stages, num_micro_batches, train, blocking_sends).run()
    return Proof(
        peak_live=[stage.peak_live for stage in stages],
        busy=[sum(span.stop - span.start for span in stage.spans) for stage in stages],
        makespan=max(stage.clock for stage in stages),
        spans=[stage.spans for stage in stages],
    )
