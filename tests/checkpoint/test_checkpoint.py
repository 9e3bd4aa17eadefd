"""A checkpoint is whole or absent, is read on any mesh by name and slice, and what is damaged is found before use."""

from __future__ import annotations

import json
import math
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI
from small import NUM_LABELS, own, small_card

from mpitrain.checkpoint import save as save_module
from mpitrain.checkpoint import saver as saver_module
from mpitrain.checkpoint.load import fill, newest_usable, overlap, verify
from mpitrain.checkpoint.manifest import Piece, Progress, committed, find_checkpoint, read_manifest
from mpitrain.checkpoint.save import clear_left_overs, retain
from mpitrain.checkpoint.saver import Saver
from mpitrain.comm.buckets import StateSlice, fill_buckets
from mpitrain.errors import CheckpointError, MpitrainError
from mpitrain.model.bert import BertStage, parameter_shapes
from mpitrain.optim import ShardedAdamW
from mpitrain.pipeline.balance import split_blocks
from mpitrain.runtime import mesh as meshes
from mpitrain.runtime.agree import any_rank, share
from mpitrain.sections import Train

CARD = small_card(vocab_size=19, hidden_size=8, num_hidden_layers=2, intermediate_size=8, max_position_embeddings=8)
SHAPES = [(1, 1), (2, 1), (1, 1, 2), (1, 2), (1, 1, 3), (3, 1), (2, 1, 2), (2, 2), (1, 4), (4, 2), (2, 2, 2)]

on_any_ranks = pytest.mark.mpi(min_size=1)


@pytest.fixture
def folder(comm, tmp_path) -> Path:
    """One folder for all ranks."""
    return Path(share(comm, str(tmp_path)))


@contextmanager
def mesh_of(comm, *shape: int) -> Iterator[meshes.Mesh | None]:
    """A mesh of the first ranks, None on the others."""
    inside = comm.rank < math.prod(shape)
    part = comm.Split(0 if inside else MPI.UNDEFINED, comm.rank)
    if inside:
        with meshes.build(part, *shape) as mesh:
            yield mesh
        part.Free()
    else:
        yield None
    comm.Barrier()


def slices_on(mesh: meshes.Mesh, *, once: bool = False) -> list[StateSlice]:
    """Weights and moments that this rank owns, all zero."""
    group = SimpleNamespace(rank=mesh.tensor, size=mesh.num_tensor)  # nobody computes here
    stage = BertStage(CARD, NUM_LABELS, [split_blocks([1.0] * 4, mesh.num_stages)[mesh.stage]], group=group)
    buckets = own(fill_buckets(stage, 2000, shards=stage.shards, shared=stage.shared), mesh.replica, mesh.num_replicas)
    optimizer = ShardedAdamW(buckets, Train(), first=mesh.tensor == 0)
    slices = list(optimizer.slices(once=once))
    for piece in slices:
        piece.values.data.zero_()
    return slices


def true_values(piece: StateSlice) -> torch.Tensor:
    """A number for each element of each tensor that no other element has."""
    first = zlib.crc32(f"{piece.kind}/{piece.name}".encode()) % 2**20
    whole = torch.arange(math.prod(piece.shape), dtype=torch.float32) + first
    found = whole.view(piece.shape)[:, slice(*piece.columns)].reshape(-1) if piece.columns else whole
    return found[piece.start : piece.stop]


def begin_save(saver: Saver, mesh: meshes.Mesh, step: int, value: float) -> tuple[Path, list[StateSlice]]:
    slices = slices_on(mesh, once=True)
    for piece in slices:
        piece.values.data.copy_(true_values(piece) + value)
    place = saver.save(
        slices,
        progress=Progress(step=step, best_step=2),
        mesh={"data": mesh.num_replicas, "pipe": mesh.num_stages, "tensor": mesh.num_tensor},
        identity={"seed": 0},
        documents={"config.json": "{}"},
        keep=99,
    )
    return place, slices


def save_on(mesh: meshes.Mesh, checkpoints: Path, step: int = 5, value: float = 0.0, *, late: bool = False) -> Path:
    checkpoints.mkdir(parents=True, exist_ok=True)
    saver = Saver(mesh.world, checkpoints, asynchronous=late)
    try:
        place, slices = begin_save(saver, mesh, step, value)
        if late:
            saver.wait_for_copy()
            for piece in slices:
                piece.values.data.fill_(-1.0)
        saver.finish()
    finally:
        saver.close()
    return place


def loads(mesh: meshes.Mesh, checkpoint: Path) -> bool:
    """Whether this rank gets the numbers that were saved."""
    slices = slices_on(mesh)
    fill(mesh.world, checkpoint, verify(mesh.world, checkpoint), slices)
    return all(torch.equal(piece.values, true_values(piece)) for piece in slices)


@on_any_ranks
def test_a_mesh_reads_what_another_wrote(comm, folder):
    fitting = [shape for shape in SHAPES if math.prod(shape) <= comm.size]
    for number, writer in enumerate(fitting):
        with mesh_of(comm, *writer) as mesh:
            path = save_on(mesh, folder / f"{writer}") if mesh else None
        path = Path(share(comm, str(path)))
        shapes = parameter_shapes(CARD, NUM_LABELS)
        assert read_manifest(path).tensors == {name: list(shape) for name, shape in shapes.items()}
        columns = [piece.columns for entry in read_manifest(path).files.values() for piece in entry.pieces]
        assert any(columns) == (len(writer) == 3), "whole matrices are found faster"
        for reader in {fitting[(number + 1) % len(fitting)], fitting[number // 2]}:
            with mesh_of(comm, *reader) as mesh:
                assert mesh is None or loads(mesh, path), f"{writer} -> {reader}"


@st.composite
def extents(draw, rows: int = 5, width: int = 6):
    """Bounds of some elements of a matrix, or of some of its columns."""
    columns = draw(st.none() | st.sampled_from([(a, b) for a in range(width) for b in range(a + 1, width + 1)]))
    first, last = columns or (0, width)
    size = rows * (last - first)
    start = draw(st.integers(0, size - 1))
    elements = np.arange(rows * width).reshape(rows, width)[:, first:last].reshape(-1)
    return {"start": start, "stop": draw(st.integers(start + 1, size)), "columns": columns}, elements


@given(extents(), extents())
def test_what_two_pieces_of_a_matrix_have_in_common_is_found_in_both(ours, theirs):
    (mine, my_elements), (other, other_elements) = ours, theirs
    wanted = StateSlice("weight", "name", (5, 6), values=torch.empty(0), **mine)
    count, here, there = overlap(wanted, Piece(kind="weight", name="name", **other))
    held, stored = my_elements[mine["start"] : mine["stop"]], other_elements[other["start"] : other["stop"]]
    assert held[here].tolist() == stored[there].tolist() == [each for each in held if each in stored]
    assert count == len(held[here])


@on_any_ranks
def test_what_is_saved_is_what_was_there_when_the_save_began(comm, folder, monkeypatch):
    copy = saver_module.fill_file
    monkeypatch.setattr(saver_module, "fill_file", lambda *arguments: (time.sleep(0.2), copy(*arguments)))
    with meshes.build(comm, comm.size, 1) as mesh:
        path = save_on(mesh, folder, late=True)
        assert loads(mesh, path)
        at_once = save_on(mesh, folder / "at-once")
        comm.Barrier()
        for file in sorted(path.glob("*.h5")):
            assert file.read_bytes() == (at_once / file.name).read_bytes()


@on_any_ranks
def test_a_save_goes_on_in_phases_and_the_next_one_waits_for_it(comm, folder):
    with meshes.build(comm, comm.size, 1) as mesh:
        saver = Saver(mesh.world, folder, asynchronous=True)
        assert not saver.is_ready()
        path, _ = begin_save(saver, mesh, 5, 0.0)
        for _ in range(2):
            assert not committed(folder)
            while not saver.is_ready():
                time.sleep(0.01)
            comm.Barrier()
            saver.advance()
        assert not saver.is_ready() and committed(folder) == [path]
        begin_save(saver, mesh, 6, 1.0)
        begin_save(saver, mesh, 7, 2.0)
        assert [place.name for place in committed(folder)] == ["step-00000006", "step-00000005"]
        comm.Barrier()
        saver.finish()
        assert committed(folder)[0].name == "step-00000007" and saver.take_seconds() > 0 == saver.take_seconds()
        saver.close()
        assert loads(mesh, path)


@on_any_ranks
@pytest.mark.parametrize("late", [False, True])
def test_a_disk_that_gives_other_bytes_back_is_no_place_for_a_checkpoint(comm, folder, monkeypatch, late):
    def sync_badly(path: Path) -> None:
        if path.name == f"rank-{comm.size - 1:05d}.h5":
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(data)

    with meshes.build(comm, comm.size, 1) as mesh:
        monkeypatch.setattr(save_module, "sync", sync_badly)
        with pytest.raises((OSError, MpitrainError), match="other bytes were read back than had been written"):
            save_on(mesh, folder, late=late)
        comm.Barrier()
        assert list(folder.iterdir()) == []


@on_any_ranks
@pytest.mark.parametrize("late", [False, True])
def test_a_failed_save_leaves_no_checkpoint_and_the_next_one_works(comm, folder, monkeypatch, late):
    with meshes.build(comm, comm.size, 1) as mesh:
        with monkeypatch.context() as patch:
            if comm.rank == comm.size - 1:
                patch.setattr(save_module, "sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises((OSError, MpitrainError), match="No space left"):
                save_on(mesh, folder, late=late)
        assert committed(folder) == []
        assert not any(path.name == "step-00000005" for path in folder.iterdir())
        assert loads(mesh, save_on(mesh, folder, late=late))


@on_any_ranks
def test_a_step_that_is_committed_already_is_left_as_it_is(comm, folder):
    with meshes.build(comm, comm.size, 1) as mesh:
        path = save_on(mesh, folder)
        assert save_on(mesh, folder, value=1.0) == path
        assert loads(mesh, path)


@on_any_ranks
def test_a_folder_without_a_manifest_is_no_checkpoint_and_is_replaced(comm, folder):
    if comm.rank == 0:
        (folder / "step-00000005").mkdir()
        (folder / "step-00000005" / "rank-00000.h5").write_text("half")
    comm.Barrier()
    assert committed(folder) == []
    comm.Barrier()
    with meshes.build(comm, 1, comm.size) if comm.size < 5 else meshes.build(comm, comm.size, 1) as mesh:
        assert loads(mesh, save_on(mesh, folder))
        assert [path.name for path in folder.iterdir()] == ["step-00000005"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda path: flip(path / "rank-00000.h5"),
    "short": lambda path: (path / "rank-00000.h5").write_bytes((path / "rank-00000.h5").read_bytes()[:-1]),
    "no bytes": lambda path: (path / "rank-00000.h5").write_bytes(b""),
    "gone": lambda path: (path / "rank-00000.h5").unlink(),
    "of another step": lambda path: shutil.copy(path.parent / "step-00000001" / "rank-00000.h5", path),
    "a link": lambda path: ((path / "rank-00000.h5").rename(path / "x"), (path / "rank-00000.h5").symlink_to("x")),
    "other config": lambda path: (path / "config.json").write_text("{} "),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-9]),
}


@on_any_ranks
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_on_all_ranks_and_the_checkpoint_before_is_used(comm, folder, damage):
    with meshes.build(comm, comm.size, 1) as mesh:
        paths = [save_on(mesh, folder, step=step, value=step) for step in (1, 2)]
        if comm.rank == 0:
            DAMAGES[damage](paths[1])
        comm.Barrier()
        with pytest.raises(CheckpointError, match=r"step-00000002/(rank-00000\.h5|\w+\.json): is ") as caught:
            verify(comm, paths[1])
        assert caught.value.agreed
        warnings: list[str] = []
        found = newest_usable(comm, folder, warnings)
    assert found is not None and found[0] == paths[0]
    assert len(warnings) == 1 and "step-00000002" in warnings[0]


@on_any_ranks
def test_no_checkpoint_is_no_error_but_only_damaged_ones_are_an_error_of_all_ranks_together(comm, folder):
    assert newest_usable(comm, folder / "none", []) is None
    with meshes.build(comm, comm.size, 1) as mesh:
        path = save_on(mesh, folder)
        if comm.rank == 0:
            flip(path / "rank-00000.h5")
            (folder / "step-00000099").mkdir()
        comm.Barrier()
        with pytest.raises(
            CheckpointError, match=r"all checkpoints are damaged(.|\n)*99/manifest.json: is not"
        ) as caught:
            newest_usable(comm, folder, [])
    assert caught.value.agreed


@on_any_ranks
def test_a_tensor_of_another_shape_and_one_with_a_gap_are_errors_of_all_ranks(comm, folder):
    with meshes.build(comm, comm.size, 1) as mesh:
        path = save_on(mesh, folder)
        manifest = verify(comm, path)
        wide = StateSlice("weight", "classifier.bias", (7,), 0, 7, torch.zeros(7))
        with pytest.raises(CheckpointError, match=r"classifier.bias has shape \[5\], the model's is \[7\]"):
            fill(comm, path, manifest, [wide] if comm.rank == 0 else [])
        for entry in manifest.files.values():
            entry.pieces = [piece for piece in entry.pieces if piece.name != "classifier.bias"]
        whole = StateSlice("exp_avg", "classifier.bias", (5,), 0, 5, torch.zeros(5))
        with pytest.raises(CheckpointError, match=r"5 elements of exp_avg classifier\.bias are in no file"):
            fill(comm, path, manifest, [whole] if comm.rank == 0 else [])


@on_any_ranks
def test_the_newest_and_a_pinned_one_are_kept(comm, folder):
    with meshes.build(comm, comm.size, 1) as mesh:
        for step in (1, 2, 3, 4, 5):
            save_on(mesh, folder, step=step)
    if comm.rank == 0:
        retain(folder, keep=2, pinned=2)
        assert [path.name for path in committed(folder)] == [f"step-{step:08d}" for step in (5, 4, 2)]
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in (2, 4, 5)]


@pytest.fixture
def lonely(tmp_path) -> Path:
    """`run` with checkpoints of steps 2 (the best) and 5, written by one rank."""
    with meshes.build(MPI.COMM_SELF, 1, 1) as mesh:
        for step in (2, 5):
            save_on(mesh, tmp_path / "run" / "checkpoints", step=step)
    return tmp_path / "run"


def test_a_run_means_its_best_checkpoint_or_its_newest(lonely):
    newest = lonely / "checkpoints" / "step-00000005"
    best = lonely / "checkpoints" / "step-00000002"
    assert find_checkpoint(lonely) == find_checkpoint(lonely / "checkpoints") == find_checkpoint(best) == best
    assert find_checkpoint(lonely, best=False) == find_checkpoint(newest) == newest
    (newest / "manifest.json").rename(lonely / "lost")
    assert find_checkpoint(lonely) == newest, "who reads it tells what is wrong"
    (lonely / "lost").rename(newest / "manifest.json")
    shutil.rmtree(best)
    assert find_checkpoint(lonely) == newest
    with pytest.raises(CheckpointError, match="nowhere: no complete checkpoint"):
        find_checkpoint(lonely / "nowhere")


def test_left_overs_of_killed_saves_are_cleared_and_copies_are_not(lonely):
    checkpoints = lonely / "checkpoints"
    copies = ["step-00000005-copy", "step-00000005.tmp-mine", "step-00000005 (copy)", "my.step-00000005.tmp-0a"]
    for name in copies:
        shutil.copytree(checkpoints / "step-00000005", checkpoints / name)
    (checkpoints / "step-00000006.tmp-0a1b2c3d").mkdir()
    clear_left_overs(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted(["step-00000002", "step-00000005", *copies])
    assert not any_rank(MPI.COMM_SELF, verify(MPI.COMM_SELF, checkpoints / copies[0]).progress.step != 5)


@pytest.mark.parametrize("name", ["../evil.h5", "/etc/passwd", "a/b.h5", "..", ".hidden", "", "x\0y"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(lonely, name):
    path = lonely / "checkpoints" / "step-00000005"
    document = json.loads((path / "manifest.json").read_text())
    document["files"][name] = document["files"].pop("rank-00000.h5")
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged: files"):
        read_manifest(path)


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


@given(st.one_of(st.binary(), st.text().map(str.encode), st.dictionaries(st.text(), st.text()).map(as_json)))
def test_any_bytes_for_a_manifest_are_a_checkpoint_error(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("bytes")
    (place / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(place)
