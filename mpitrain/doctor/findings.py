"""What a check has found: a verdict, what is there, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mpitrain.errors import ExitCode

Verdict = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """One line for a person, one entry of the document.

    Attributes:
        check: its name.
        found: what is there.
        advice: what to do; nothing if all is well.
        facts: what it was judged by, for JSON.
        code: the exit code that it means if it is bad.
    """

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    code: int = ExitCode.DONE


Facts = Mapping[str, Any]
NOTHING: Facts = {}


def ok(check: str, found: str, facts: Facts = NOTHING) -> Finding:
    """As it should be."""
    return Finding(check, "ok", found, facts=facts)


def warn(check: str, found: str, advice: str, facts: Facts = NOTHING) -> Finding:
    """A training would run, but slower or less safely than it could."""
    return Finding(check, "warn", found, advice, facts)


def bad(check: str, found: str, advice: str, facts: Facts = NOTHING, code: int = ExitCode.USAGE) -> Finding:
    """A training would not run, or not as it should: 64 where another start mends it, 70 where the machine errs."""
    return Finding(check, "bad", found, advice, facts, code)


def exit_code(findings: Sequence[Finding]) -> int:
    """0 without bad findings; 70 if one of them is a fault, else 64."""
    return max((finding.code for finding in findings), default=ExitCode.DONE)
