"""The errors a user can meet; each kind carries the exit code that job scripts rely on."""

from __future__ import annotations


class ExitCode:
    """Exit codes, also written to `exit.json` because launchers change what a shell sees."""

    DONE = 0
    USAGE = 64
    BAD_DATA = 65
    NO_CHECKPOINT = 66
    FAULT = 70
    STOPPED = 75
    NO_PROGRESS = 93


class MpitrainError(Exception):
    """Something that the user can mend: the message says where, what was found, what would work.

    Attributes:
        agreed: every rank raises this error, so that they can leave together; otherwise the job must be aborted.
    """

    code = ExitCode.FAULT
    agreed = False


class UsageError(MpitrainError):
    """Wrong flags, configuration or launch."""

    code = ExitCode.USAGE


class DataError(MpitrainError):
    """Bad input text, shards, recipe or pretrained directory."""

    code = ExitCode.BAD_DATA


class CheckpointError(MpitrainError):
    """No checkpoint can be used."""

    code = ExitCode.NO_CHECKPOINT


class NoProgressError(MpitrainError):
    """Start after start fails at the same place: another one would, too."""

    code = ExitCode.NO_PROGRESS


def code_of(error: BaseException) -> int:
    """The exit code that an error means."""
    return error.code if isinstance(error, MpitrainError) else ExitCode.FAULT


def on_all_ranks(error: MpitrainError) -> MpitrainError:
    """Mark an error that every rank is about to raise, because every rank looked at the same values."""
    error.agreed = True
    return error


def error_of(code: int, message: str) -> MpitrainError:
    """Rebuild on this rank the error that another rank met."""
    kinds = {kind.code: kind for kind in (UsageError, DataError, CheckpointError, NoProgressError)}
    return kinds.get(code, MpitrainError)(message)
