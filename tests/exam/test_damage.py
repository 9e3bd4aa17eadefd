"""Cases 6 to 8 and 17: files of a run are damaged, missing, left over or copied, and what is kept."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from examining import NUM_STEPS, SEED, Exam, newest, steps_of
from launching import mpitrain
from mpi4py import MPI
from tiny import exit_of

from mpitrain.checkpoint.load import verify
from mpitrain.dataset.shards import open_dataset, verify_dataset
from mpitrain.errors import MpitrainError

FLIPS = 1000


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
    "no manifest": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "half a manifest": change("manifest.json", lambda data: data[: len(data) // 2]),
}


@pytest.mark.case(6)
def test_every_flipped_byte_is_found(reference: Exam, told):
    run, chance = reference.copy("flipped"), random.Random(SEED)
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
    run = reference.copy(out)
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
    run = reference.copy("hopeless")
    for step in steps_of(run):
        DAMAGES["one bit"](run / "checkpoints" / f"step-{step:08d}")
    done = reference.run(2, "hopeless")
    assert done.returncode == 66 and "all checkpoints are damaged" in done.stderr, done.stderr
    assert steps_of(run) == steps_of(reference.reference(2)) and exit_of(run)["code"] == 66
    told("all checkpoints damaged", "exit code 66, nothing written")


@pytest.mark.case(6)
def test_a_run_whose_checkpoints_are_gone_begins_anew_loudly(reference: Exam, told):
    run = reference.copy("bereft")
    for place in list((run / "checkpoints").iterdir()):
        shutil.rmtree(place)
    done = reference.finish(2, "bereft", 0)
    assert f"bereft/metrics.jsonl tells of {NUM_STEPS} steps, but bereft/checkpoints holds no checkpoint" in done.stdout
    told("all checkpoints deleted", "said so, begun anew, bit-equal")


@pytest.mark.case(7)
@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"step-00000099\n"])
def test_a_pointer_to_the_latest_is_not_believed(reference: Exam, told, content):
    out = f"pointer-{len(content)}"
    run = reference.copy(out)
    for place in (run, run / "checkpoints"):
        (place / "latest").write_bytes(content)
    (run / "checkpoints" / "step-00000099").mkdir()
    reference.finish(2, out, NUM_STEPS)
    assert not (run / "checkpoints" / "step-00000099").exists()
    told(f"a file `latest` of {content!r}, an empty step-00000099", "went on from step 6, bit-equal")


@pytest.mark.case(8)
def test_left_overs_go_and_copies_stay(reference: Exam, told):
    run = reference.copy("left-overs")
    checkpoints = run / "checkpoints"
    shutil.copytree(newest(run), checkpoints / "step-00000006-copy")
    shutil.rmtree(newest(run))
    shutil.copytree(checkpoints / "step-00000005", checkpoints / "step-00000006.tmp-0123abcd")
    (checkpoints / "step-00000006.tmp-0123abcd" / "manifest.json").unlink()
    reference.finish(2, "left-overs", 5)
    assert verify(MPI.COMM_SELF, checkpoints / "step-00000006-copy").progress.step == NUM_STEPS
    told("half a save of step 6 left over, a copy of step 6", "left-over gone, copy whole, bit-equal")


@pytest.mark.case(17)
def test_damage_of_all_that_is_newer_leaves_the_best_to_go_on_from(reference: Exam, told):
    run = reference.copy("kept")
    for step in steps_of(run)[1:]:
        DAMAGES["one bit"](run / "checkpoints" / f"step-{step:08d}")
    done = reference.finish(2, "kept", steps_of(run)[0])
    assert done.stdout.count("falling back to the checkpoint before it") == 2
    told("keep 2, and both damaged", f"said so, went on from step {steps_of(reference.reference(2))[0]}, bit-equal")


@pytest.mark.case(17)
@pytest.mark.parametrize("place, visit", [("save.discard", 1), ("save.committed", 3), ("save.retain", 2)])
def test_of_one_checkpoint_that_is_kept_none_is_lost(reference: Exam, told, place, visit):
    out, keep = f"one-{place}", ("--checkpoint.keep", "1", "--checkpoint.best", "false")
    done = reference.run(2, out, settings=keep, MPITRAIN_FAILPOINT=f"{place}:0:{visit}=kill")
    assert done.returncode != 0
    steps = steps_of(reference.place / out)
    assert 1 <= len(steps) <= 2
    again = reference.run(2, out, settings=keep)
    assert again.returncode == 0 and f"resume   step {steps[-1]} from" in again.stdout, again.stdout
    assert steps_of(reference.place / out) == [NUM_STEPS]
    assert not list((reference.place / out / "checkpoints").glob("*.tmp-*"))
    told(
        f"keep 1, kill at {place}, visit {visit}", f"{steps} were there, went on from {steps[-1]}, one left at the end"
    )


@pytest.mark.case(17)
def test_the_best_stays_beside_the_newest(reference: Exam, told):
    reference.reference(2)
    out = reference.run(2, "best", settings=("--checkpoint.keep", "1"))
    assert out.returncode == 0 and "best     weights of step 3, the best on dev" in out.stdout
    assert steps_of(reference.place / "best") == [3, NUM_STEPS]
    told("keep 1, the best at step 3", f"steps 3 and {NUM_STEPS} are there")
