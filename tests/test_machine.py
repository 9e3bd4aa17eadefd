"""A machine's figures: what a file says, and what some steps of training give away."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from mpitrain.arrange import arrange
from mpitrain.bench.step import Turn
from mpitrain.config import Config
from mpitrain.errors import UsageError
from mpitrain.forecast import step_terms
from mpitrain.gauge import STEPS, _solve, _speeds
from mpitrain.machine import Load, Machine, read_machine
from mpitrain.model.card import ModelCard
from mpitrain.model.cost import block_costs

TRUE = Machine(
    name='four "fast" cores',
    ranks_per_node=4,
    processors_per_node=4,
    memory_gib_per_node=8,
    gflops=37,
    sum_gb_per_second=1.5,
    update_mega_per_second=210,
    step_ms=0,
    message_us=330,
    exchange_us=120,
)
CARD = ModelCard(
    vocab_size=500,
    hidden_size=64,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=64,
)


def test_a_file_that_was_written_says_the_same_when_it_is_read(tmp_path):
    TRUE.write(tmp_path / "made" / "machine.toml")
    assert read_machine(tmp_path / "made" / "machine.toml") == TRUE


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path):
    file = tmp_path / "m.toml"
    file.write_text("ranks_per_node = 0\ngflops = 'many'\nsum_gb_per_second = inf\nspeed = 3\n")
    with pytest.raises(UsageError) as caught:
        read_machine(file)
    text = str(caught.value)
    assert all(word in text for word in (str(file), "ranks_per_node", "found 0", "gflops", "found 'many'", "speed"))
    assert re.search("sum_gb_per_second: .*found inf", text)
    assert re.search("memory_gib_per_node: [^;]*$", text, re.M), "what is not there has no value"


@pytest.mark.parametrize(
    "content, problem", [(None, "cannot be read"), (b"a = = 1", "is not TOML"), (b"\xff", "is not TOML")]
)
def test_what_is_no_such_file_is_said(tmp_path, content, problem):
    file = tmp_path / "m.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        read_machine(file)


class OnPaper:
    """Steps that take exactly as long as they should on the true machine."""

    def __init__(self) -> None:
        self.config = Config(train={"batch_size": 32, "micro_batches": 8, "threads": 1})
        self.problem = SimpleNamespace(card=CARD, label_names=["O"] * 7)
        self.room = SimpleNamespace(on_host=True)

    def on(self, mesh) -> Config:
        axes = dict(zip(("data", "pipe", "tensor"), mesh, strict=True))
        return self.config.model_copy(update={"mesh": self.config.mesh.model_copy(update=axes)})

    def arranged(self, mesh):
        return arrange(4, self.on(mesh), CARD, 7)

    def expect(self, machine: Machine, load: Load, mesh) -> dict[str, float]:
        return step_terms(machine, load, self.on(mesh), CARD, 7, self.arranged(mesh))

    def run(self, mesh) -> Turn:
        """What each rank measures; stages compute as long as they have operations to do."""
        terms, found = self.expect(TRUE, Load(4, 100, 20.0), mesh), self.arranged(mesh)
        costs = block_costs(CARD, 7, 20.0)
        stages = [sum(sum(costs[first:last]) for first, last in chunks) for chunks in found.stages]
        passes = [STEPS * terms["compute"] * found.pipe * stage / sum(stages) for stage in stages]
        parts = {"forward_backward": STEPS * terms["compute"], "tensor": 0.0, "update": STEPS * terms["update"]}
        return Turn(STEPS * 32 * 20, STEPS * sum(terms.values()), parts, passes)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("first", [(4, 1, 1), (1, 4, 1), (1, 1, 4)])
def test_figures_are_found_again_in_the_steps_that_they_make_whichever_mesh_comes_first(first, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = Machine(ranks_per_node=4, processors_per_node=4, memory_gib_per_node=8, gflops=1, step_ms=0)
    trial, load = OnPaper(), Load(4, 100, 23.0)  # the batches of the trial are shorter than the average
    found = _speeds(found, load, trial, first, trial.run(first))
    for mesh in ((4, 1, 1), (1, 4, 1), (1, 1, 4)):
        found = _solve(found, load, trial, mesh, trial.run(mesh))
    for field in ("gflops", "sum_gb_per_second", "update_mega_per_second", "message_us", "exchange_us"):
        assert getattr(found, field) == pytest.approx(getattr(TRUE, field), rel=1e-2), field


def test_steps_that_are_faster_than_their_passes_leave_nothing_for_messages():
    turn = Turn(STEPS * 640, 1e-9, {}, [0.0])
    assert _solve(TRUE, Load(4, 100, 20.0), OnPaper(), (1, 4, 1), turn).message_us == pytest.approx(0)


def test_what_is_not_done_in_a_node_is_not_measured_there():
    apart, turn = TRUE.model_copy(update={"ranks_per_node": 1}), Turn(STEPS * 640, 9.0, {}, [0.0])
    assert _solve(apart, Load(4, 100, 20.0), OnPaper(), (4, 1, 1), turn) == apart
