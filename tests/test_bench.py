"""The benchmark prints and writes what it measured, and times nothing that sums wrongly."""

from __future__ import annotations

import json

import pytest
import torch
from launching import mpitrain

from mpitrain.bench.allreduce import Contender, _check
from mpitrain.errors import MpitrainError


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_contender_is_timed_at_every_size_beside_the_others(tmp_path, ranks):
    done = mpitrain(ranks, "bench", "allreduce", "--kib", "1,64", "--repeats", "2", "--out", "results", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout, "gloo and matplotlib are here"
    assert "node/MPI" in done.stdout and "node/gloo" in done.stdout
    found = json.loads((tmp_path / "results" / f"allreduce-{ranks}.json").read_text())
    contenders = [("fp32", name) for name in ("node", "ring", "ring16", "native", "MPI", "gloo")]
    contenders += [("bf16", name) for name in ("node", "ring", "gloo")]
    rows = {(row["dtype"], row["contender"], row["bytes"]): row for row in found["seconds"]}
    assert set(rows) == {(*contender, 1024 * kib) for contender in contenders for kib in (1, 64)}
    assert all(0 < row["lower"] <= row["median"] <= row["upper"] for row in rows.values())
    assert (found["ranks"], found["repeats"]) == (ranks, 2)
    assert found["command"].endswith("bench allreduce --kib 1,64 --repeats 2 --out results")
    assert (tmp_path / "results" / f"allreduce-{ranks}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpi(min_size=2)
def test_a_contender_that_sums_wrongly_is_not_timed(comm):
    values = torch.zeros(10)
    with pytest.raises((RuntimeError, MpitrainError), match="lazy summed 10 elements wrongly"):
        _check(comm, "lazy", Contender(values, lambda: values))


@pytest.mark.parametrize("wrong", ["--kib x", "--kib 0", "--repeats 0", "--repeats x"])
def test_sizes_and_repeats_are_counts(tmp_path, wrong):
    done = mpitrain(2, "bench", "allreduce", *wrong.split(), cwd=tmp_path)
    assert done.returncode == 64, done.stdout + done.stderr
    assert f"argument {wrong.split()[0]}" in done.stderr and "Traceback" not in done.stderr
