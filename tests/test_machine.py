"""A machine's figures: what a file says, and what some steps of training give away."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mpitrain.arrange import arrange
from mpitrain.bench.step import Turn
from mpitrain.config import Config
from mpitrain.errors import UsageError
from mpitrain.forecast import step_terms
from mpitrain.gauge import STEPS, _solve, _speeds
from mpitrain.machine import Load, Machine, read_machine
from mpitrain.model.card import ModelCard

TRUE = Machine(
    name="four cores",
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
    file.write_text("ranks_per_node = 0\ngflops = 'many'\nmemory_gib_per_node = 4\nspeed = 3\n")
    with pytest.raises(UsageError) as caught:
        read_machine(file)
    text = str(caught.value)
    assert all(word in text for word in (str(file), "ranks_per_node", "found 0", "gflops", "found 'many'", "speed"))


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

    def expect(self, machine: Machine, load: Load, mesh) -> dict[str, float]:
        axes = dict(zip(("data", "pipe", "tensor"), mesh, strict=True))
        config = self.config.model_copy(update={"mesh": self.config.mesh.model_copy(update=axes)})
        return step_terms(machine, load, config, CARD, 7, arrange(4, config, CARD, 7))

    def run(self, mesh) -> Turn:
        tokens = 32 * 20
        terms = self.expect(TRUE, Load(4, 100, 20.0), mesh)
        parts = {"forward_backward": STEPS * terms["compute"], "update": STEPS * terms["update"]}
        return Turn(STEPS * tokens, STEPS * sum(terms.values()), parts, [STEPS * terms["compute"]])


def test_figures_are_found_again_in_the_steps_that_they_make():
    blank = Machine(ranks_per_node=4, processors_per_node=4, memory_gib_per_node=8, gflops=1)
    trial, load = OnPaper(), Load(4, 100, 23.0)  # the batches of the trial are shorter than the average
    found = _speeds(blank, load, trial, (4, 1, 1))
    found = _solve(found, "message_us", load, trial, (1, 4, 1))
    found = _solve(found, "exchange_us", load, trial, (1, 1, 4))
    for field in ("gflops", "sum_gb_per_second", "update_mega_per_second", "message_us", "exchange_us"):
        assert getattr(found, field) == pytest.approx(getattr(TRUE, field), rel=1e-3), field


def test_steps_that_are_faster_than_their_passes_leave_nothing_for_messages():
    trial = OnPaper()
    trial.run = lambda mesh: Turn(STEPS * 640, 1e-9, {}, [0.0])
    assert _solve(TRUE, "message_us", Load(4, 100, 20.0), trial, (1, 4, 1)).message_us == pytest.approx(0)
