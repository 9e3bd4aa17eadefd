"""All ranks multiply by the same library, whatever each of them has measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mpitrain import place
from mpitrain.errors import UsageError
from mpitrain.model import linear
from mpitrain.observe.console import Console
from mpitrain.runtime.agree import collect
from mpitrain.runtime.device import share_cores
from mpitrain.sections import Train

pytestmark = pytest.mark.mpi(min_size=1)


@pytest.fixture(autouse=True)
def _library_of_others():
    before = linear.in_use()
    yield
    linear.use(before)


class Listening(Console):
    """Keeps what is said."""

    said = ""

    def say(self, topic: str, text: str) -> None:
        self.said = text


def chosen(comm, **options) -> str:
    console = Listening(False)
    place.choose_library(comm, Train(**options), console)
    [library] = set(collect(comm, linear.in_use()))
    assert console.said.startswith(f"fp32 products by {linear.NAMES[library]}, ") or not console.said
    return library


@pytest.mark.parametrize("odd, expected", [("onednn", "torch"), ("torch", "onednn")])
def test_what_suits_the_maker_is_taken_unless_it_is_much_slower_on_all_ranks_together(comm, monkeypatch, odd, expected):
    # The first rank alone would go the other way.
    usual = {expected: 1.0, odd: 1.0 + 9 * (comm.rank > 0 or comm.size == 1)}
    monkeypatch.setattr(
        linear, "time_libraries", lambda: usual | ({odd: 0.5} if comm.rank == 0 < comm.size - 1 else {})
    )
    monkeypatch.setattr(linear, "suits_maker", lambda: odd)
    assert chosen(comm) == expected
    assert chosen(comm, reproducible=True) == odd
    assert chosen(comm, linear=odd) == odd
    monkeypatch.setattr(linear, "suits_maker", lambda: expected)
    assert chosen(comm) == expected


def test_a_check_that_others_do_not_confirm_decides_nothing(comm, monkeypatch):
    found = iter([{"onednn": 1.0, "torch": 9.0}] * 2 + [{"onednn": 1.0, "torch": 1.0}])
    monkeypatch.setattr(linear, "suits_maker", lambda: "torch")
    monkeypatch.setattr(linear, "time_libraries", lambda: next(found))
    assert chosen(comm) == "torch"


def test_a_small_difference_decides_nothing(comm, monkeypatch):
    monkeypatch.setattr(linear, "suits_maker", lambda: "torch")
    monkeypatch.setattr(linear, "time_libraries", lambda: {"onednn": 1.0, "torch": 1.4})
    assert chosen(comm) == "torch"


def test_where_one_rank_has_no_onednn_all_leave_it(comm, monkeypatch):
    linear.use("onednn")
    monkeypatch.setattr(linear, "has_onednn", lambda: comm.rank != comm.size - 1)
    assert chosen(comm) == "torch"
    with pytest.raises(UsageError, match="torch would work"):
        chosen(comm, linear="onednn")


@pytest.mark.parametrize(
    "gpus, told", [(1, "1 GPU(s) like G100, up to {} ranks on one"), (99, "{} GPU(s) like G100, one a rank")]
)
def test_ranks_that_share_a_gpu_are_said_whatever_number_it_has_for_each(comm, monkeypatch, gpus, told):
    monkeypatch.setattr(place, "gpu_of", lambda device: f"GPU-{comm.rank % gpus}")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "G100")
    console, transport = Listening(False), SimpleNamespace(device=torch.device("cuda", 0), staged=True, patient=False)
    place.say_place(comm, console, transport, "so", share_cores(comm, 1))
    words = told.format(comm.size) if comm.size > 1 else "1 GPU(s) like G100, one a rank"
    assert console.said == f"{words}; tensors reach MPI staged through pinned host memory (so)"
