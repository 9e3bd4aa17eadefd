"""Cases 6 to 8: files of a run are damaged, missing, left over or copied."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from examining import NUM_STEPS, SEED, Exam, steps_of
from launching import mpitrain
from mpi4py import MPI
from tiny import exit_of

from mpitrain.checkpoint.load import verify
from mpitrain.dataset.shards import open_dataset, verify_dataset
from mpitrain.errors import MpitrainError

FLIPS = 1000


def newest(run: Path) -> Path:
    return run / "checkpoints" / f"step-{steps_of(run)[-1]:08d}"


def copy_of(reference: Exam, out: str) -> Path:
    """A finished run of two ranks that may be spoilt."""
    return Path(shutil.copytree(reference.reference(2), reference.place / out))


def swap(checkpoint: Path) -> None:
    first, second = checkpoint / "rank-00000.h5", checkpoint / "rank-00001.h5"
    first.rename(checkpoint / "aside")
    second.rename(first)
    (checkpoint / "aside").rename(second)


def change(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_bytes(edit((checkpoint / name).read_bytes()))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": change("rank-00001.h5", lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]),
    "a byte short": change("rank-00001.h5", lambda data: data[:-1]),
    "no bytes": change("rank-00000.h5", lambda data: b""),
    "a file gone": lambda checkpoint: (checkpoint / "rank-00001.h5").unlink(),
    "files swapped": swap,
    "of another step": lambda checkpoint: shutil.copy(
        sorted(checkpoint.parent.iterdir())[0] / "rank-00000.h5", checkpoint
    ),
    "step in manifest": change("manifest.json", lambda data: data.replace(b'"step": 6', b'"step": 4')),
    "half a manifest": change("manifest.json", lambda data: data[: len(data) // 2]),
}


@pytest.mark.case(6)
def test_every_flipped_byte_is_found(reference: Exam, told):
    run, chance = copy_of(reference, "flipped"), random.Random(SEED)
    dataset = next(reference.place.glob("cache/**/dataset.json")).parent
    shards = Path(shutil.copytree(dataset, reference.place / "shards"))
    info = open_dataset(shards)
    files = [*newest(run).iterdir(), shards / "dataset.json", *shards.glob("*.h5")]
    for _ in range(FLIPS):
        path = chance.choice(files)
        whole = path.read_bytes()
        where, bits = chance.randrange(len(whole)), chance.randrange(1, 256)
        path.write_bytes(whole[:where] + bytes([whole[where] ^ bits]) + whole[where + 1 :])
        with pytest.raises(MpitrainError):
            if path.parent == shards:
                open_dataset(shards)
                verify_dataset(MPI.COMM_SELF, shards, info)
            else:
                verify(MPI.COMM_SELF, path.parent)
        path.write_bytes(whole)
    verify(MPI.COMM_SELF, newest(run))
    told(f"{FLIPS} flipped bytes in checkpoint and shards (SEED={SEED})", "all found")


@pytest.mark.case(6)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_loudly(reference: Exam, told, damage):
    out = f"damaged-{damage.replace(' ', '-')}"
    run = copy_of(reference, out)
    before = steps_of(run)[-2]
    DAMAGES[damage](newest(run))
    done = reference.finish(2, out, before)
    assert "step-00000006" in done.stdout and "falling back to the checkpoint before it" in done.stdout
    told(f"newest checkpoint: {damage}", f"said so, went on from step {before}, bit-equal")


@pytest.mark.case(6)
def test_another_tokenizer_beside_the_shards_is_refused(reference: Exam, told):
    reference.reference(2)
    dataset = next(reference.place.glob("cache/**/dataset.json")).parent
    shards = Path(shutil.copytree(dataset, reference.place / "other"))
    text = (shards / "tokenizer.json").read_text()
    (shards / "tokenizer.json").write_text(text.replace('"##a"', '"##\u00e4"'))
    done = mpitrain(2, *reference.flags, "--data", str(shards), "--out", "unread", cwd=reference.place)
    assert done.returncode == 65 and "tokenizer.json: damaged" in done.stderr, done.stderr
    told("a word piece in the tokenizer of the shards", "exit code 65")


@pytest.mark.case(6)
def test_without_a_whole_checkpoint_nothing_is_started(reference: Exam, told):
    run = copy_of(reference, "hopeless")
    for step in steps_of(run):
        DAMAGES["one bit"](run / "checkpoints" / f"step-{step:08d}")
    done = reference.run(2, "hopeless")
    assert done.returncode == 66 and "all checkpoints are damaged" in done.stderr, done.stderr
    assert steps_of(run) == steps_of(reference.reference(2)) and exit_of(run)["code"] == 66
    told("all checkpoints damaged", "exit code 66, nothing written")


@pytest.mark.case(7)
@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"step-00000099\n"])
def test_a_pointer_to_the_latest_is_not_believed(reference: Exam, told, content):
    out = f"pointer-{len(content)}"
    run = copy_of(reference, out)
    for place in (run, run / "checkpoints"):
        (place / "latest").write_bytes(content)
    (run / "checkpoints" / "step-00000099").mkdir()
    reference.finish(2, out, NUM_STEPS)
    told(f"a file `latest` of {content!r}, an empty step-00000099", "went on from step 6, bit-equal")


@pytest.mark.case(8)
def test_left_overs_go_and_copies_stay(reference: Exam, told):
    run = copy_of(reference, "left-overs")
    checkpoints = run / "checkpoints"
    shutil.copytree(newest(run), checkpoints / "step-00000006-copy")
    shutil.rmtree(newest(run))
    shutil.copytree(checkpoints / "step-00000005", checkpoints / "step-00000006.tmp-0123abcd")
    (checkpoints / "step-00000006.tmp-0123abcd" / "manifest.json").unlink()
    reference.finish(2, "left-overs", 5)
    assert verify(MPI.COMM_SELF, checkpoints / "step-00000006-copy").progress.step == NUM_STEPS
    told("half a save of step 6 left over, a copy of step 6", "left-over gone, copy whole, bit-equal")
