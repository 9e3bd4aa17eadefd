"""Who holds what: every block once, whatever mesh and schedule; what does not fit is refused with arithmetic."""

from __future__ import annotations

import pytest
from small import small_card

from mpitrain import config
from mpitrain.arrange import arrange, name_blocks, read_table
from mpitrain.errors import UsageError
from mpitrain.pipeline.schedule import SCHEDULES

CARD = small_card().model_copy(update={"num_hidden_layers": 12})


def arranged(num_ranks: int, *flags: str, card=CARD):
    settings = config.load(flags)
    return arrange(num_ranks, settings, card, 9, table=read_table(settings))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pipe", [1, 2, 3, 4, 7])
def test_every_block_is_held_once_by_the_stages_of_a_replica(name, pipe):
    found = arranged(2 * pipe, "--mesh.pipe", str(pipe), "--pipeline.schedule", name)
    assert (found.data, found.pipe) == (2, pipe)
    blocks = sorted(block for chunks in found.stages for first, last in chunks for block in range(first, last))
    assert blocks == list(range(14))
    ends = {(stage, place) for stage, chunks in enumerate(found.stages) for place in chunks if 14 in place}
    assert {stage for stage, _ in ends} == {0 if name == "zb-v" else pipe - 1}


def test_as_many_chunks_as_are_asked_for():
    found = arranged(2, "--mesh.pipe", "2", "--pipeline.schedule", "interleaved", "--pipeline.chunks", "3")
    assert [len(chunks) for chunks in found.stages] == [3, 3]


def test_layers_by_hand_are_those_of_each_chunk_and_make_the_mesh():
    found = arranged(2, "--pipeline.schedule", "interleaved", "--pipeline.balance", "2,3,3,4")
    assert found.stages == [[(0, 3), (6, 9)], [(3, 6), (9, 14)]]
    words = [name_blocks(chunks, CARD) for chunks in found.stages]
    assert words == ["embeddings, layers 0-1; layers 5-7", "layers 2-4; layers 8-11, classifier"]


@pytest.mark.parametrize(
    ("num_ranks", "flags", "problem"),
    [
        (2, ["--mesh.pipe", "2", "--pipeline.balance", "4,4,4"], "4,4,4: 3 counts, the mesh has 2 stages$"),
        (
            2,
            ["--mesh.pipe", "2", "--pipeline.balance", "6,6", "--pipeline.schedule", "zb-v"],
            "6,6: 2 counts, the mesh has 2 stages of 2 chunks",
        ),
        (
            8,
            ["--mesh.pipe", "8", "--pipeline.schedule", "zb-v"],
            "8 stages have 16 chunks, each of which needs a block; the model has 14 .*; fewer stages or chunks",
        ),
        (3, ["--mesh.pipe", "2"], "2 data|1 data x 2 pipe"),
        (2, ["--mesh.pipe", "2", "--pipeline.schedule", "none.csv"], "none.csv: No such file"),
    ],
)
def test_what_does_not_fit_is_refused(num_ranks, flags, problem):
    with pytest.raises(UsageError, match=problem):
        arranged(num_ranks, *flags)


def test_halves_of_backward_passes_cannot_be_added_up_by_a_tree():
    with pytest.raises(UsageError, match=r"take --pipeline\.schedule 1f1b or gpipe"):
        config.load(["--train.reproducible", "true", "--pipeline.schedule", "zb-h1"])


def test_a_file_makes_the_mesh(tmp_path):
    (tmp_path / "own.csv").write_text("0F0,0B0\n1F0,1B0\n")
    found = arranged(4, "--pipeline.schedule", str(tmp_path / "own.csv"), "--train.micro_batches", "2")
    assert (found.data, found.pipe) == (2, 2)


def test_no_such_schedule():
    with pytest.raises(UsageError, match=r"should be one of 1f1b, gpipe, .* or a file that ends with .csv; found 'x'"):
        config.load(["--pipeline.schedule", "x"])
