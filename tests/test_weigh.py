"""Stages of even time: what blocks take is measured, the split follows it, and a resumed run keeps its split."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import NUM_LABELS, small_card, small_split

from mpitrain import config, weigh
from mpitrain.arrange import arrange, stages_of
from mpitrain.comm.buffers import Transport
from mpitrain.comm.group import open_group
from mpitrain.errors import MpitrainError
from mpitrain.observe.console import Console
from mpitrain.place import Place
from mpitrain.runtime import mesh as meshes

PROBLEM = SimpleNamespace(card=small_card(), label_names=list(map(str, range(NUM_LABELS))))
EVEN = [0.1, 1.0, 1.0, 1.0, 1.0, 0.1]


class Listening(Console):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(False)
        self.said: dict[str, str] = {}

    def say(self, topic: str, text: str) -> None:
        self.said[topic] = text


def settings_of(*flags: str) -> config.Config:
    return config.load(["--pipeline.balance", "measured", *flags])


def place_of(comm, pipe: int, settings: config.Config) -> Place:
    mesh = meshes.build(comm, comm.size // pipe, pipe)
    arrangement = arrange(comm.size, settings, PROBLEM.card, NUM_LABELS, pipe=pipe)
    transport = Transport(torch.device("cpu"), True, comm.size > 2)
    return Place(mesh, transport, arrangement, open_group(mesh.world, mesh.tensor_axis, transport))


def balanced(comm, monkeypatch, pipe: int, *flags: str) -> tuple[list[float], list[float]]:
    """Work of each stage, and the times that are said, where stage 0 of the last replica is three times as slow."""
    settings, console = settings_of("--mesh.pipe", str(pipe), *flags), Listening()
    factor = 3.0 if comm.rank == comm.size - pipe else 1.0
    monkeypatch.setattr(weigh, "time_blocks", lambda *arguments: [factor * seconds for seconds in EVEN])
    place = place_of(comm, pipe, settings)
    found = weigh.balance(place, settings, PROBLEM, small_split(), console).arrangement
    place.close()
    loads = [sum(sum(EVEN[first:last]) for first, last in chunks) for chunks in found.stages]
    said = console.said["balance"].removeprefix("stage times ").removesuffix(" ms a micro-batch")
    return loads, [float(word) for word in said.split(" / ")]


def test_a_stage_is_as_slow_as_the_slowest_of_its_ranks():
    # One replica of two stages of two ranks each, two blocks.
    pace = weigh.pace_of([[1.0, 2.0], [1.0, 3.0], [4.0, 4.0], [2.0, 2.0]], 2, 2)
    assert pace.seconds == [2.5, 3.5]
    assert pace.speeds == pytest.approx([6 / 4, 6 / 8])


@pytest.mark.mpi(min_size=2)
def test_a_slow_stage_gets_less_and_one_slow_replica_makes_it_slow(comm, monkeypatch):
    pipe = 2 if comm.size % 2 == 0 else comm.size
    loads, times = balanced(comm, monkeypatch, pipe)
    assert loads == pytest.approx({2: [1.1, 3.1], 3: [0.1, 2.0, 2.1]}[pipe])
    assert times == pytest.approx([3000 * loads[0], *(1000 * load for load in loads[1:])], rel=1e-2)


@pytest.mark.mpi(min_size=2, max_size=2)
def test_a_slow_stage_gets_less_in_all_of_its_chunks(comm, monkeypatch):
    loads, times = balanced(comm, monkeypatch, 2, "--pipeline.schedule", "zb-v")
    assert loads == pytest.approx([1.2, 3.0])
    assert times == pytest.approx([3600, 3000], rel=1e-2)


@pytest.mark.mpi(min_size=2)
def test_a_block_that_fails_on_one_rank_fails_on_all(comm, monkeypatch):
    def fail(*arguments):
        if comm.rank == comm.size - 1:
            raise MpitrainError("no memory for it")
        return EVEN

    monkeypatch.setattr(weigh, "time_blocks", fail)
    place = place_of(comm, comm.size if comm.size < 5 else 2, settings_of())
    with pytest.raises(MpitrainError, match="no memory for it"):
        weigh.balance(place, settings_of(), PROBLEM, small_split(), Listening())
    place.close()


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("flags", [[], ["--train.precision", "bf16"], ["--train.recompute", "block"]])
@pytest.mark.parametrize("num_layers", [1, 4])
def test_every_block_takes_its_time_and_the_first_layers_all_the_same(comm, flags, num_layers):
    settings, problem = settings_of(*flags), SimpleNamespace(**vars(PROBLEM))
    problem.card = small_card(num_hidden_layers=num_layers, hidden_size=256, intermediate_size=1024, vocab_size=97)
    place = SimpleNamespace(transport=SimpleNamespace(device=torch.device("cpu"), patient=comm.size > 2))
    found = weigh.time_blocks(place, settings, problem, small_split())
    assert len(found) == num_layers + 2 and min(found) > 0
    assert len(set(found[1:-2])) <= 1
    assert min(found[1:-1]) > found[-1], "a layer has far more to compute than the head"


def test_a_typical_micro_batch_is_like_the_split():
    split = small_split(num_sequences=2000)
    layout = weigh.typical_layout(split, 100, torch.device("cpu"))
    assert layout.num_sequences == 100
    assert layout.num_tokens / 100 == pytest.approx(split.index.lengths.mean(), rel=0.05)
    share = split.index.words.sum() / split.index.lengths.sum()
    assert layout.num_wanted / layout.num_tokens == pytest.approx(share, rel=0.01)
    assert weigh.typical_layout(split, 1, torch.device("cpu")).num_tokens == np.sort(split.index.lengths)[1000]


def checkpoint_at(place, mesh) -> config.Config:
    (place / "manifest.json").write_text("{}")
    (place / "config.json").write_text(json.dumps({"mesh": mesh}))
    return settings_of("--resume", str(place))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-v"])
def test_a_resumed_run_takes_up_the_split_that_it_had(tmp_path, schedule):
    flags = ["--mesh.pipe", "2", "--pipeline.schedule", schedule]
    arrangement = arrange(4, settings_of(*flags), PROBLEM.card, NUM_LABELS)
    uneven = {2: [(0, 1), (1, 6)], 4: [(0, 1), (1, 2), (2, 3), (3, 6)]}[len(arrangement.chunks)]
    before = replace(arrangement, chunks=uneven)
    listed = json.loads(json.dumps(before.listed()))
    assert stages_of(listed) == before.stages
    settings = checkpoint_at(tmp_path, {"data": 2, "tensor": 1, "stages": listed})
    assert weigh.last_split(arrangement, settings) == uneven
    assert weigh.last_split(arrangement, settings_of("--resume", "none")) is None
    assert weigh.last_split(arrangement, settings_of("--resume", str(tmp_path / "none"))) is None
    other = arrange(2, settings_of(*flags), PROBLEM.card, NUM_LABELS)
    assert weigh.last_split(other, settings) is None, "another number of replicas"


@pytest.mark.parametrize(
    "mesh",
    [
        {},
        {"data": 2},
        {"data": 2, "tensor": 1, "stages": []},
        {"data": 2, "tensor": 1, "stages": [[0, 2], [2, 4], [4, 6]]},
        {"data": 2, "tensor": 1, "stages": [[], [2, 6]]},
        {"data": 2, "tensor": 1, "stages": [[[0, 1], [1, 2]], [2, 6]]},
        {"data": 2, "tensor": 1, "stages": [[2, 6], [0, 2]]},
        {"data": 2, "tensor": 1, "stages": [0, 6]},
    ],
)
def test_a_split_of_another_mesh_or_none_at_all_is_not_taken_up(tmp_path, mesh):
    arrangement = arrange(4, settings_of("--mesh.pipe", "2"), PROBLEM.card, NUM_LABELS)
    assert weigh.last_split(arrangement, checkpoint_at(tmp_path, mesh)) is None


@pytest.mark.mpi(min_size=2, max_size=3)
def test_a_split_that_is_taken_up_is_not_measured_again(comm, tmp_path, monkeypatch):
    place = place_of(comm, comm.size, settings_of())
    uneven = {2: [(0, 1), (1, 6)], 3: [(0, 1), (1, 2), (2, 6)]}[comm.size]
    listed = replace(place.arrangement, chunks=uneven).listed()
    settings, console = checkpoint_at(tmp_path, {"data": 1, "tensor": 1, "stages": listed}), Listening()
    monkeypatch.setattr(weigh, "time_blocks", lambda *arguments: pytest.fail("measured"))
    found = weigh.balance(place, settings, PROBLEM, small_split(), console)
    assert (found.arrangement.chunks, console.said) == (uneven, {"balance": "as before"})
    unasked = config.load(["--resume", settings.resume])
    assert weigh.balance(place, unasked, PROBLEM, small_split(), console) is place
    place.close()
