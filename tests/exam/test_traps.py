"""Cases 39 to 41: files made to lead the reader astray, with hashes that are right, so that these do not help."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from examining import Exam, newest, steps_of
from launching import command, mpirun
from mpi4py import MPI

import mpitrain
from mpitrain.checkpoint.load import verify
from mpitrain.dataset.shards import DatasetInfo, open_dataset, verify_dataset
from mpitrain.errors import CheckpointError, DataError, ExitCode
from mpitrain.files import Digest, parts_of, seal

SECONDS, MEBIBYTES = 1.0, 200
Edit = Callable[[h5py.File, str], object]


def sealed_again(document: Path, change: Callable[[dict[str, Any]], object] = lambda told: None) -> None:
    """Write a manifest or dataset.json anew: changed, with the true hashes of its files, and sealed."""
    told = json.loads(document.read_text())
    shards = (entry for entries in told.get("splits", {}).values() for entry in entries)
    files = told["files"] if "files" in told else {entry["file"]: entry for entry in shards}
    for name, entry in files.items():
        if (document.parent / name).is_file():
            digest = Digest.of(parts_of(document.parent / name))._asdict()
            entry.update({key: digest[key] for key in digest if key in entry})
            if "bytes" in entry:
                entry["bytes"] = (document.parent / name).stat().st_size
    change(told)
    document.write_text(seal(json.dumps(told | {"seal": ""}, indent=1)))


def replaced(**options: Any) -> Edit:
    """The dataset with other options."""

    def edit(file: h5py.File, name: str) -> None:
        values = file[name][:]
        del file[name]
        file.create_dataset(name, **({"data": values} | options))

    return edit


def linked(link: Any) -> Edit:
    def edit(file: h5py.File, name: str) -> None:
        del file[name]
        file[name] = link

    return edit


def stored_outside(file: h5py.File, name: str) -> None:
    size = len(file[name])
    dtype = file[name].dtype
    del file[name]
    file.create_dataset(name, (size,), dtype, external=[("/etc/passwd", 0, size * dtype.itemsize)])


def virtual(file: h5py.File, name: str) -> None:
    size, dtype = len(file[name]), file[name].dtype
    del file[name]
    layout = h5py.VirtualLayout((size,), dtype)
    layout[:] = h5py.VirtualSource("/etc/passwd", "passwords", (size,))
    file.create_virtual_dataset(name, layout)


def foreign_filter(file: h5py.File, name: str) -> None:
    size, kind = len(file[name]), h5py.h5t.py_create(file[name].dtype)
    del file[name]
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_chunk((size,))
    plan.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, (1, 2))
    h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple((size,)), plan)


def bomb(file: h5py.File, name: str) -> None:
    dtype = file[name].dtype
    del file[name]
    file.create_dataset(name, (1 << 32,), dtype, chunks=(1 << 22,), compression="gzip", fillvalue=1)


def nested(file: h5py.File, name: str) -> None:
    group = file
    for number in range(2000):
        group = group.create_group(f"deep{number % 7}")
    group["root"] = file["/"]
    del file[name]
    file[name] = group["root"]


TRAPS: dict[str, Edit] = {
    "external link": linked(h5py.ExternalLink("/etc/passwd", "/x")),
    "soft link": linked(h5py.SoftLink("/elsewhere")),
    "storage outside": stored_outside,
    "virtual dataset": virtual,
    "filter 32001": foreign_filter,
    "2^50 elements declared": replaced(data=None, shape=(1 << 50,), dtype="<f4"),
    "gzip bomb": bomb,
    "chunk of 4 GiB": replaced(data=None, shape=(1 << 31,), dtype="<f4", chunks=((1 << 30) - 1,)),
    "2,000 groups, one in the other": nested,
    "objects": replaced(data=[pickle.dumps(0).hex()] * 4),
    "lists of any length": replaced(data=np.array([np.ones(2), np.ones(3)], object), dtype=h5py.vlen_dtype(np.float32)),
}
# Reads in a process of its own, with how long it took, and how much memory more it needed than before.
READ = """
import json, resource, sys, time
from pathlib import Path
import torch
from mpi4py import MPI
from mpitrain.checkpoint.load import fill, verify
from mpitrain.comm.buckets import StateSlice
from mpitrain.dataset.shards import open_dataset, verify_dataset
from mpitrain.errors import MpitrainError

def read(place):
    if (place / "dataset.json").is_file():
        return verify_dataset(MPI.COMM_SELF, place, open_dataset(place))
    manifest = verify(MPI.COMM_SELF, place)
    piece = next(piece for piece in manifest.files["rank-00000.h5"].pieces if piece.kind == "weight")
    values, shape = torch.zeros(piece.stop - piece.start), tuple(manifest.tensors[piece.name])
    fill(MPI.COMM_SELF, place, manifest, [StateSlice("weight", piece.name, shape, piece.start, piece.stop, values)])

found = {}
for place in sys.argv[1:]:
    used, began, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), None
    try:
        read(Path(place))
    except MpitrainError as error:
        said = f"{type(error).__name__}: {error}"
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
    found[Path(place).name] = [said, time.perf_counter() - began, more / 1024]
print(json.dumps(found))
"""


def first_weight(checkpoint: Path) -> str:
    """The name of one that rank 0 has written."""
    entry = json.loads((checkpoint / "manifest.json").read_text())["files"]["rank-00000.h5"]
    return str(next(piece["name"] for piece in entry["pieces"] if piece["kind"] == "weight"))


def shards_of(reference: Exam, out: str) -> Path:
    """A copy of the shards of the exam."""
    reference.reference(2)
    return Path(shutil.copytree(next(reference.place.glob("cache/**/dataset.json")).parent, reference.place / out))


def read_all(reference: Exam, places: list[Path]) -> dict[str, tuple[str | None, float, float]]:
    done = mpirun(0, "-c", READ, *map(str, places), cwd=reference.place)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[str | None, float, float]] = json.loads(done.stdout)
    return found


@pytest.mark.case(41)
@pytest.mark.parametrize("what", ["checkpoint", "shards"])
def test_hdf5_is_followed_nowhere(reference: Exam, told, what):
    places = []
    for trap, edit in {"nothing": lambda file, name: None, **TRAPS}.items():
        out = f"{what}-{trap}".replace(" ", "-").replace("^", "")
        if what == "checkpoint":
            place = newest(reference.copy(out)).rename(reference.place / f"{out}-only")
            file, name, document = place / "rank-00000.h5", f"weight/{first_weight(place)}", place / "manifest.json"
        else:
            place = shards_of(reference, out)
            file, name, document = place / "train-00000.h5", "tokens", place / "dataset.json"
        with h5py.File(file, "r+") as opened:
            edit(opened, name)
        sealed_again(document)
        places.append(place)
    found = read_all(reference, places)
    assert found.pop(places[0].name)[0] is None, "what is right is read"
    for trap, (said, seconds, mebibytes) in found.items():
        kind, name = ("CheckpointError", "rank-00000.h5") if what == "checkpoint" else ("DataError", "train-00000.h5")
        assert said is not None and said.startswith(f"{kind}: ") and name in said, (trap, said)
        assert seconds < SECONDS and mebibytes < MEBIBYTES, (trap, seconds, mebibytes)
    slowest, largest = (max(each[number] for each in found.values()) for number in (1, 2))
    told(f"{len(found)} traps in HDF5 files of {what}", f"refused in at most {slowest:.2f} s, {largest:.0f} MiB more")


NAMES = ["../rank-00000.h5", "/etc/passwd", "a/b.h5", "..", ".hidden", "a\0b", "a\n", "", "x" * 200]
PLACES: dict[str, Callable[[Path], object]] = {
    "a link": lambda file: (file.rename(file.with_name("aside")), file.symlink_to(file.with_name("aside"))),
    "a link to a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero")),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a directory": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.case(40)
@pytest.mark.parametrize("what", ["checkpoint", "shards"])
def test_names_lead_nowhere(reference: Exam, told, what):
    def rename(told: dict[str, Any], name: str) -> None:
        if what == "checkpoint":
            told["files"][name] = told["files"].pop("rank-00000.h5")
        else:
            told["splits"]["train"][0]["file"] = name

    for number, name in enumerate(NAMES):
        if what == "checkpoint":
            place = newest(reference.copy(f"named-{number}"))
            sealed_again(place / "manifest.json", lambda told, name=name: rename(told, name))
            with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged: files\."):
                verify(MPI.COMM_SELF, place)
        else:
            place = shards_of(reference, f"named-{number}-shards")
            sealed_again(place / "dataset.json", lambda told, name=name: rename(told, name))
            with pytest.raises(DataError, match=r"splits\.train\.0\.file"):
                open_dataset(place)
    told(f"{len(NAMES)} names that lead out of {what}", "refused before any file is opened")


@pytest.mark.case(40)
@pytest.mark.parametrize("trap", PLACES)
def test_what_is_no_plain_file_is_not_read(reference: Exam, told, trap):
    out = trap.replace(" ", "-")
    place, shards = newest(reference.copy(out)), shards_of(reference, f"{out}-shards")
    for file in (place / "rank-00001.h5", shards / "train-00000.h5"):
        PLACES[trap](file)
    with pytest.raises(CheckpointError, match="is not there as a regular file"):
        verify(MPI.COMM_SELF, place)
    info: DatasetInfo = open_dataset(shards)
    with pytest.raises(DataError, match="missing, or not a plain file"):
        verify_dataset(MPI.COMM_SELF, shards, info)
    line = command(2, "-m", "mpitrain", "evaluate", "--checkpoint", str(place))
    done = reference.begin_line(out, line).end()
    assert done.returncode == ExitCode.NO_CHECKPOINT and "is not there as a regular file" in done.stderr, done.stderr
    told(f"{trap} in place of a file", "refused, exit code 66 on all ranks, no hang")


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.case(39)
def test_nothing_is_unpickled(reference: Exam, told):
    canary = reference.place / "canary"
    poison = pickle.dumps(Canary(canary))
    pickle.loads(poison)
    assert canary.exists(), "the canary sings"
    canary.unlink()
    contents: dict[str, Callable[[Path], object]] = {
        "pickle": lambda file: file.write_bytes(poison),
        "npy": lambda file: np.save(file.open("wb"), np.array([Canary(canary)], object), allow_pickle=True),
        "hdf5": lambda file: write_objects(file, poison),
    }
    places = []
    for name, write in contents.items():
        place = newest(reference.copy(f"poison-{name}")).rename(reference.place / f"poison-{name}-only")
        write(place / "rank-00000.h5")
        write(place / "tokenizer.json")
        sealed_again(place / "manifest.json")
        places.append(place)
    for name, (said, *_) in read_all(reference, places).items():
        assert said is not None and "CheckpointError" in said, name
    for place in places:
        line = command(1, "-m", "mpitrain", "evaluate", "--checkpoint", str(place))
        done = reference.begin_line(place.name, line).end()
        assert done.returncode == ExitCode.NO_CHECKPOINT and "Traceback" not in done.stderr, done.stderr
    assert not canary.exists()
    told(f"a pickle as {', '.join(contents)} in a checkpoint", "refused, the canary is silent")


def write_objects(file: Path, poison: bytes) -> None:
    with h5py.File(file, "w") as made:
        made.create_dataset(f"weight/{first_weight(file.parent)}", data=np.void(poison))


FORBIDDEN = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle", "eval", "exec", "__import__"}
LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load")}
# mpi4py's methods that pickle what they are given.
PICKLING = {"send", "recv", "isend", "irecv", "ssend", "bcast", "gather", "allgather", "scatter", "alltoall", "reduce"}
PICKLING |= {"allreduce", "scan", "exscan", "sendrecv", "bsend", "mprobe", "ibcast"}
COMMS = {"comm", "world", "node", "axis", "data_axis", "pipe_axis", "tensor_axis", "partners"}


@pytest.mark.case(39)
def test_no_line_of_the_program_could_unpickle(told):
    files = sorted(Path(mpitrain.__file__).parent.rglob("*.py"))
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.id] if isinstance(node, ast.Name) else []
            assert not FORBIDDEN & set(names), (file, names)
            if isinstance(node, ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
                assert (owner, node.attr) not in LOADERS, (file, node.lineno)
                assert not (owner.lstrip("_") in COMMS and node.attr in PICKLING), (file, node.lineno, node.attr)
    told(f"{len(files)} modules", "no pickle, no eval, no torch.load, no lower-case mpi4py call")


POISONED = """
import os, pickle, sys
from mpi4py import MPI

def refuse(*arguments, **options):
    os.write(2, b"something was unpickled")
    os._exit(99)

pickle.loads = pickle.load = pickle.Unpickler = pickle.dumps = refuse
MPI.pickle.__init__(dumps=refuse, loads=refuse)
from mpitrain import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.case(39)
def test_a_run_needs_no_pickle(reference: Exam, told):
    reference.reference(2)
    script = reference.place / "poisoned.py"
    script.write_text(POISONED)
    done = reference.run(2, "unpickled", str(script), MPITRAIN_FAILPOINT="reduce:0:2=ask")
    assert done.returncode == ExitCode.STOPPED, done.stderr
    run = reference.place / "unpickled"
    assert reference.run(2, "unpickled", str(script)).returncode == 0
    (reference.place / "in.txt").write_text("Maria Jordan flew to Paris .\n")
    for words in (["evaluate"], ["predict", "in.txt", "--out", "tags"], ["export", "--out", "exported"]):
        line = command(2, str(script), *words, "--checkpoint", str(run))
        done = reference.begin_line("used", line).end()
        assert done.returncode == 0, done.stderr
    assert steps_of(run)
    told("pickle poisoned on all ranks", "trained, resumed, evaluated, predicted, exported")
