"""Play all stages of a schedule against each other on paper: does it end, how long does it take, what does it hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

from mpitrain.pipeline.schedule import Instruction, Kind, Placement, in_turn

TimeOf = Callable[[Instruction, int], float]  # of a pass of the chunk at a place in the model


class ScheduleError(ValueError):
    """The programs of the stages do not fit together."""


@dataclass(frozen=True)
class Span:
    """A piece of compute, from `start` to `stop`, in the unit of the times given to `play`."""

    instruction: Instruction
    start: float
    stop: float


@dataclass(frozen=True)
class Proof:
    """What a schedule costs. Lists have one entry per stage; times are in the unit of the times given to `play`."""

    peak_live: list[int]  # most chunks of micro-batches whose forward is done and whose whole backward is not
    makespan: float
    spans: list[list[Span]]  # all that is computed, in order

    @property
    def busy(self) -> list[float]:
        """Time in which each stage computes."""
        return [sum(span.stop - span.start for span in stage) for stage in self.spans]

    @property
    def bubble(self) -> float:
        """Share of the makespan in which the average stage computes nothing."""
        return max(0.0, 1 - sum(self.busy) / len(self.spans) / self.makespan) if self.makespan else 0.0


@dataclass(frozen=True)
class Times:
    """How long a chunk's passes take, by its place in the model, or alike for all."""

    forward: float | Sequence[float] = 1.0
    backward: float | Sequence[float] = 2.0
    weight: float | Sequence[float] = 1.0  # the part of the backward pass that is for gradients of weights

    def __call__(self, step: Instruction, place: int) -> float:
        """Of one pass of the chunk at a place in the model."""
        found = (self.forward, self.backward, self.weight)
        forward, backward, weight = (each if isinstance(each, int | float) else each[place] for each in found)
        times = {Kind.FORWARD: forward, Kind.BACKWARD: backward, Kind.BACKWARD_WEIGHT: weight}
        return times.get(step.kind, backward - weight)


@dataclass(frozen=True, slots=True)
class _Message:
    """A message's identity; the same two stages and the same direction are told apart by MPI's tag."""

    stage: int  # that receives
    chunk: int
    is_activation: bool
    micro_batch: int

    def __str__(self) -> str:
        chunk = f", chunk {self.chunk}" if self.chunk else ""
        return f"{'activation' if self.is_activation else 'gradient'} {self.micro_batch} to stage {self.stage}{chunk}"


@dataclass
class _Stage:
    """Where one stage has got to."""

    program: tuple[Instruction, ...]
    clock: float = 0.0
    position: int = 0
    live: int = 0
    peak_live: int = 0
    spans: list[Span] = field(default_factory=list)
    computed: set[Instruction] = field(default_factory=set)
    sends: list[_Message] = field(default_factory=list)


SENDS, POSTS = (Kind.SEND_ACTIVATION, Kind.SEND_GRADIENT), (Kind.POST_ACTIVATION, Kind.POST_GRADIENT)
RECEIVES = (Kind.RECEIVE_ACTIVATION, Kind.RECEIVE_GRADIENT)
OF_ACTIVATIONS = (Kind.POST_ACTIVATION, Kind.RECEIVE_ACTIVATION, Kind.SEND_ACTIVATION)
HALVES = (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
SAME = {Kind.FORWARD: [Kind.FORWARD], Kind.BACKWARD: [Kind.BACKWARD, *HALVES]}  # what must not be computed twice
SAME |= {half: [half, Kind.BACKWARD] for half in HALVES}


class _Play:
    """All stages and the messages between them. Whose turn comes first does not matter: a stage waits, or goes on."""

    def __init__(
        self,
        stages: list[_Stage],
        placement: Placement,
        num_micro_batches: int,
        times: TimeOf,
        train: bool,
        blocking_sends: bool,
    ) -> None:
        self.stages, self.placement, self.times = stages, placement, times
        self.num_micro_batches, self.train, self.blocking_sends = num_micro_batches, train, blocking_sends
        self.posted: dict[_Message, float] = {}  # at which time
        self.sent: dict[_Message, float] = {}
        self.received: set[_Message] = set()

    def run(self) -> None:
        while any([self.advance(number) for number in range(len(self.stages))]):  # noqa: C419 - every stage gets a turn
            pass
        waiting = [number for number, stage in enumerate(self.stages) if stage.position < len(stage.program)]
        for number in set(range(len(self.stages))) - set(waiting):
            self.require_all(number)  # or others wait for what this stage never computes
        if waiting:
            blocked = [f"stage {each} waits at '{self.next_of(each)}'" for each in waiting]
            raise ScheduleError(f"deadlock: {'; '.join(blocked)}{self.describe_cycle(waiting[0])}")
        self.check_end()

    def next_of(self, number: int) -> Instruction:
        return self.stages[number].program[self.stages[number].position]

    def describe_cycle(self, number: int) -> str:
        """Who waits for whom, from a stage that waits."""
        path = [number]
        while (number := self.awaited_by(number)) not in path:
            path.append(number)
            if self.stages[number].position == len(self.stages[number].program):
                return f"; stage {number} has come to its end"
        cycle = [*path[path.index(number) :], number]
        return f"; in a circle: stage {' waits for stage '.join(map(str, cycle))}"

    def awaited_by(self, number: int) -> int:
        step = self.next_of(number)
        if step.kind is Kind.DRAIN:
            return next(message.stage for message in self.stages[number].sends if message not in self.posted)
        message = self.message(number, step)
        return message.stage if step.kind in SENDS else self.sender(message)

    def sender(self, message: _Message) -> int:
        neighbour = self.placement.neighbour(message.stage, message.chunk, -1 if message.is_activation else 1)
        assert neighbour is not None
        return neighbour[0]

    def advance(self, number: int) -> bool:
        """Carry out what can be carried out now; whether that was anything."""
        stage, start = self.stages[number], self.stages[number].position
        while stage.position < len(stage.program) and self.carry_out(number, stage.program[stage.position]):
            stage.position += 1
        return stage.position > start

    def carry_out(self, number: int, step: Instruction) -> bool:
        """One instruction of one stage; False when it has to wait."""
        stage = self.stages[number]
        if step.kind in POSTS:
            message = self.message(number, step)
            self.require(message not in self.posted, number, step, "was posted before")
            self.posted[message] = stage.clock
        elif step.kind in RECEIVES:
            return self.receive(number, step)
        elif step.kind in SENDS:
            return self.send(number, step)
        elif step.kind is Kind.DRAIN:
            if any(message not in self.posted for message in stage.sends):
                return False
            stage.clock = max([stage.clock, *(self.posted[message] for message in stage.sends)])
        else:
            self.compute(number, step)
        return True

    def receive(self, number: int, step: Instruction) -> bool:
        message = self.message(number, step)
        self.require(message in self.posted, number, step, "was not posted before")
        self.require(message not in self.received, number, step, "was received before")
        if message not in self.sent:
            return False
        self.stages[number].clock = max(self.stages[number].clock, self.sent[message])
        self.received.add(message)
        return True

    def send(self, number: int, step: Instruction) -> bool:
        stage, message = self.stages[number], self.message(number, step)
        made_by = [Kind.FORWARD] if message.is_activation else [Kind.BACKWARD, Kind.BACKWARD_INPUT]
        self.require_computed(number, step, made_by, step.chunk)
        self.require(message not in self.sent, number, step, "was sent before")
        if self.blocking_sends:
            if message not in self.posted:
                return False
            stage.clock = max(stage.clock, self.posted[message])
        self.sent[message] = stage.clock
        stage.sends.append(message)
        return True

    def compute(self, number: int, step: Instruction) -> None:
        stage, places = self.stages[number], self.placement.places[number]
        exists = 0 <= step.micro_batch < self.num_micro_batches and step.chunk < len(places)
        self.require(exists and (self.train or step.kind is Kind.FORWARD), number, step, "is not part of this step")
        before = {Instruction(kind, step.micro_batch, step.chunk) for kind in SAME[step.kind]} & stage.computed
        self.require(not before, number, step, "was computed before")
        self.require_inputs(number, step)
        start, stage.clock = stage.clock, stage.clock + self.times(step, places[step.chunk])
        stage.spans.append(Span(step, start, stage.clock))
        stage.computed.add(step)
        if self.train and step.kind is not Kind.BACKWARD_INPUT:
            stage.live += 1 if step.kind is Kind.FORWARD else -1
            stage.peak_live = max(stage.peak_live, stage.live)

    def require_inputs(self, number: int, step: Instruction) -> None:
        """What a piece of compute needs has come, or was computed here."""
        if step.kind is Kind.BACKWARD_WEIGHT:
            self.require_computed(number, step, [Kind.BACKWARD_INPUT], step.chunk)
            return
        forward = step.kind is Kind.FORWARD
        if not forward:
            self.require_computed(number, step, [Kind.FORWARD], step.chunk)
        source = self.placement.neighbour(number, step.chunk, -1 if forward else 1)
        if source is None:
            return
        if source[0] == number:
            makers = [Kind.FORWARD] if forward else [Kind.BACKWARD, Kind.BACKWARD_INPUT]
            self.require_computed(number, step, makers, source[1])
        else:
            came = _Message(number, step.chunk, forward, step.micro_batch) in self.received
            self.require(came, number, step, f"comes before its {'activation' if forward else 'gradient'}")

    def require_computed(self, number: int, step: Instruction, kinds: Sequence[Kind], chunk: int) -> None:
        needed = [Instruction(kind, step.micro_batch, chunk) for kind in kinds]
        there = any(each in self.stages[number].computed for each in needed)
        self.require(there, number, step, f"comes before '{needed[0]}'")

    def message(self, number: int, step: Instruction) -> _Message:
        """What an instruction posts, receives or sends."""
        is_activation, sends = step.kind in OF_ACTIVATIONS, step.kind in SENDS
        there = step.chunk < len(self.placement.places[number])
        onward = 1 if is_activation == sends else -1
        other = self.placement.neighbour(number, step.chunk, onward) if there else None
        alone = other is None or other[0] == number
        self.require(not alone, number, step, f"has no neighbour: there are {len(self.stages)} stages")
        return _Message(*(other if sends and other else (number, step.chunk)), is_activation, step.micro_batch)

    def require(self, condition: bool, number: int, step: Instruction, problem: str) -> None:
        if not condition:
            raise ScheduleError(f"stage {number}: '{step}' {problem}")

    def check_end(self) -> None:
        """All stages came to their end: have they waited for every message."""
        for number, stage in enumerate(self.stages):
            if not stage.program or stage.program[-1].kind is not Kind.DRAIN:
                raise ScheduleError(f"stage {number}: the program does not end with '{Kind.DRAIN.value}'")
        left = sorted(map(str, (self.posted.keys() | self.sent.keys()) - self.received))
        if left:
            raise ScheduleError(f"posted or sent, but never received: {', '.join(left)}")

    def require_all(self, number: int) -> None:
        due, computed = set(), self.stages[number].computed
        for place in product(range(self.num_micro_batches), range(len(self.placement.places[number]))):
            halves = {Instruction(kind, *place) for kind in HALVES}
            backward = halves if halves & computed else {Instruction(Kind.BACKWARD, *place)}
            due |= {Instruction(Kind.FORWARD, *place)} | (backward if self.train else set())
        missing = sorted(due - computed, key=lambda step: (step.kind.value, step.micro_batch, step.chunk))
        if missing:
            raise ScheduleError(f"stage {number}: never computed: {', '.join(map(str, missing))}")


def play(
    programs: Sequence[tuple[Instruction, ...]],
    num_micro_batches: int,
    *,
    placement: Placement | None = None,
    times: TimeOf | None = None,
    train: bool = True,
    blocking_sends: bool = True,
) -> Proof:
    """Play the programs of stages 0, 1, ... against each other; messages take no time, waiting for them does.

    Args:
        programs: of each stage.
        num_micro_batches: of the replica.
        placement: one chunk a stage if None.
        times: a forward takes 1, a backward 2, half of that for weights, if None.
        train: False for evaluation, which has no backward.
        blocking_sends: a send holds its stage until the neighbour has posted the receive, as MPI_Ssend does; else only
            DRAIN waits for that. What passes both ways relies on no buffering by MPI.

    Raises:
        ScheduleError: the programs deadlock, leave a message without its counterpart, compute before what they need
            is there, or do not compute everything exactly once (forward, and backward if `train`).
    """
    stages = [_Stage(told) for told in programs]
    placement = placement or in_turn(len(stages), 1)
    _Play(stages, placement, num_micro_batches, times or Times(), train, blocking_sends).run()
    spans = [stage.spans for stage in stages]
    return Proof([stage.peak_live for stage in stages], max(stage.clock for stage in stages), spans)
