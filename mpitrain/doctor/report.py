"""What a person sees of the findings, line by line as they come, and what a ticket holds of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.text import Text

from mpitrain import __version__
from mpitrain.doctor.findings import Finding, exit_code
from mpitrain.errors import ExitCode, UsageError
from mpitrain.observe.console import Console

STYLES = {"ok": "green", "warn": "bold yellow", "bad": "bold red"}


class Report:
    """Speaks on rank 0; keeps all findings."""

    def __init__(self, console: Console) -> None:
        """Nothing is found yet."""
        self._console = console
        self.findings: list[Finding] = []

    def add(self, findings: Iterable[Finding]) -> None:
        """Tell them, with lines of one paragraph below each other."""
        for finding in findings:
            self.findings.append(finding)
            head = Text.assemble((f"{finding.verdict:<5}", STYLES[finding.verdict]), (f"{finding.check:<14}", "bold"))
            self._console.paragraph(head, finding.found)
            if finding.advice:
                self._console.paragraph(Text(" " * len(head)), f"-> {finding.advice}")

    def end(self, facts: dict[str, Any], *, as_json: bool) -> int:
        """Sum it up, and write the document to standard output if it is wanted; the exit code."""
        code = exit_code(self.findings)
        number = {verdict: sum(each.verdict == verdict for each in self.findings) for verdict in STYLES}
        told = f"{number['ok']} ok, {number['warn']} warning(s), {number['bad']} bad; exit code {code}"
        self._console.say("doctor", f"{'healthy' if code == ExitCode.DONE else 'not healthy'}: {told}")
        if as_json and self._console.loud:
            document = {"mpitrain": __version__, "healthy": code == ExitCode.DONE, "exit_code": code, **facts}
            checks = [{key: value for key, value in asdict(each).items() if key != "code"} for each in self.findings]
            Console(loud=True).show(Text(json.dumps(document | {"checks": checks}, indent=1)))
        return code


def report_refusal(error: UsageError, part: str, *, as_json: bool) -> None:
    """All that can be said where MPI does not start (the launcher's first rank only)."""
    report = Report(Console(loud=True, to_stderr=as_json))
    found, _, advice = str(error).rpartition("; ")
    report.add([Finding(part, "bad", found, advice, {}, error.code)])
    report.end({"started": False}, as_json=as_json)
