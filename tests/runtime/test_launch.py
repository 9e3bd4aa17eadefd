"""A sound start is told from a broken one, and stop signals are noted, not obeyed at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mpitrain.errors import DataError, UsageError
from mpitrain.runtime import launch


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch) -> None:
    for name in (*launch.SIZE_VARIABLES, *launch.RANK_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in launch.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def _hooks_as_before(monkeypatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


def fake_mpi(size: int, level: int) -> SimpleNamespace:
    """As of a library that is initialised with a level of threads when it is asked to be."""
    world = SimpleNamespace(size=size, rank=0, Abort=lambda code: None)
    levels = {f"THREAD_{name}": number for number, name in enumerate(("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE"))}
    asked: list[int] = []
    return SimpleNamespace(
        COMM_WORLD=world,
        Is_initialized=lambda: bool(asked),
        Init_thread=asked.append,
        Query_thread=lambda: min(asked[0], level),
        Get_library_version=lambda: "MPICH Version: 5.0.2\nMPICH ABI: 18:2:6",
        Get_version=lambda: (5, 0),
        __file__="MPI.mpich.so",
        **levels,
    )


def test_without_a_launcher_nothing_is_announced():
    assert launch.announced(launch.SIZE_VARIABLES) is None
    launch.check_launch(1, fake_mpi(1, 3))


@pytest.mark.parametrize("variable", launch.SIZE_VARIABLES)
def test_ranks_that_do_not_know_of_each_other_are_refused(monkeypatch, variable):
    mpi = fake_mpi(1, 3)
    monkeypatch.setenv(variable, "4")
    launch.check_launch(4, mpi)
    with pytest.raises(UsageError, match=r"started 4 ranks, but MPI sees a world of 1: .*\(MPICH 5.0.2"):
        launch.check_launch(1, mpi)
    monkeypatch.setenv(variable, "1")
    launch.check_launch(1, mpi)


def test_a_variable_that_is_no_number_says_nothing(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "many")
    monkeypatch.setenv("PMI_SIZE", "3")
    assert launch.announced(launch.SIZE_VARIABLES) == 3


@pytest.mark.usefixtures("_signals_as_before")
@pytest.mark.parametrize("number", launch.STOP_SIGNALS)
def test_a_stop_signal_is_noted_as_often_as_it_comes(number):
    signal.signal(number, signal.SIG_DFL)
    stop = launch.StopRequest()
    stop.listen()
    assert not stop
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert stop
    assert stop.signals == [number.name] * 2


@pytest.mark.usefixtures("_signals_as_before")
def test_under_nohup_a_lost_terminal_stays_without_effect():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = launch.StopRequest()
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop


def test_without_an_mpi_library_the_message_says_how_to_get_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UsageError, match=r"no MPI library can be loaded .*pip install 'mpitrain\[mpich\]'"):
        launch.import_mpi()


@pytest.mark.usefixtures("_hooks_as_before")
def test_a_start_needs_threads_that_may_all_call_mpi(monkeypatch):
    monkeypatch.setattr(launch, "import_mpi", lambda **told: fake_mpi(2, 3))
    assert launch.start().size == 2
    monkeypatch.setattr(launch, "import_mpi", lambda **told: fake_mpi(2, 1))
    with pytest.raises(UsageError, match="MPI_THREAD_MULTIPLE"):
        launch.start()


@pytest.mark.usefixtures("_hooks_as_before")
def test_mpi4pys_settings_of_threads_hold(monkeypatch):
    import mpi4py

    monkeypatch.setattr(launch, "import_mpi", lambda **told: fake_mpi(2, 3))
    for name, value in {"thread_level": "serialized", "threads": False}.items():
        with monkeypatch.context() as changed:
            changed.setattr(mpi4py.rc, name, value)
            with pytest.raises(UsageError, match="MPI_THREAD_MULTIPLE"):
                launch.start()


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ZeroDivisionError("by zero"), 70, b"[rank 5] ZeroDivisionError: by zero\n"),
        (DataError("x.conll:3: odd"), 65, b"error (rank 5): x.conll:3: odd\n"),
    ],
)
def test_a_stray_error_names_its_rank_and_takes_all_ranks_down(monkeypatch, error, code, text):
    written, codes = [], []
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append(data))
    monkeypatch.setattr(os, "_exit", codes.append)
    launch.abort(SimpleNamespace(rank=5, Abort=codes.append), error, None)
    assert codes == [code, 70]
    assert b"".join(written) == text


def test_what_a_launcher_has_not_read_yet_is_waited_for_but_not_for_ever():
    reading, writing = os.pipe()
    os.write(writing, b"[rank 1] Traceback")
    begun = time.monotonic()
    launch.let_the_launcher_read(writing, seconds=0.2)
    assert time.monotonic() - begun > 0.2  # nobody reads
    taken: list[bytes] = []
    reader = threading.Timer(0.2, lambda: taken.append(os.read(reading, 100)))
    reader.start()
    launch.let_the_launcher_read(writing, seconds=60)
    reader.join()
    assert taken == [b"[rank 1] Traceback"] and time.monotonic() - begun < 30
    os.close(reading), os.close(writing)


def test_the_library_names_itself_in_a_few_words():
    assert any(name in launch.library_version() for name in ("MPICH", "Open MPI"))
