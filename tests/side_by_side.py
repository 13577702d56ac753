# SPDX-License-Identifier: Apache-2.0
"""The tests that run on both backends, and what came of them side by side: `make test-backends`.

A row is a file of tests. *differs*: it cannot pass there, and tests/backends.py says why; that it fails there is what
has to be. Exit code 1: one has failed, was skipped, or did not run on both. The figures, with each test that was not as
it has to be, are in build/backends.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).parent
OUTPUT = TESTS.parent / "build" / "backends.json"
BACKENDS = ("afxdp", "dpdk")
OUTCOMES = ("passed", "failed", "differs", "skipped")


@dataclass
class Result:
    """One test on one backend."""

    file: str
    name: str
    backend: str
    outcome: str = "passed"
    seconds: float = 0.0
    why: str = ""


@dataclass
class Collect:
    """A plug-in of pytest, in the process that gathers what the workers report."""

    results: dict[str, Result] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors.append(f"{report.nodeid}: {report.longreprtext}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        backend = dict(report.user_properties).get("backend")
        if backend is None:
            return
        path, _, name = report.nodeid.partition("::")
        result = self.results.setdefault(report.nodeid, Result(Path(path).stem, name, str(backend)))
        result.seconds += report.duration
        if outcome := outcome_of(report):
            result.outcome, result.why = outcome, getattr(report, "wasxfail", "") or report.longreprtext


def outcome_of(report: pytest.TestReport) -> str:
    """Of one of its steps; empty: as it has to be."""
    if report.failed:
        return "failed"
    if report.skipped:
        return "differs" if hasattr(report, "wasxfail") else "skipped"
    return ""


def function(result: Result) -> str:
    return result.name.partition("[")[0]


def one_sided(results: Iterable[Result]) -> list[str]:
    """Tests that ran on one backend only."""
    seen: dict[str, set[str]] = {}
    for r in results:
        seen.setdefault(f"{r.file}::{function(r)}", set()).add(r.backend)
    return sorted(name for name, where in seen.items() if where != set(BACKENDS))


def summed(results: Iterable[Result]) -> dict[str, Any]:
    """{file: {"tests": n, backend: {outcome: n, "seconds": s}}}."""
    files: dict[str, dict[str, Any]] = {}
    functions: dict[str, set[str]] = {}
    for r in sorted(results, key=lambda r: r.file):
        row = files.setdefault(
            r.file, {"tests": 0} | {b: dict.fromkeys(OUTCOMES, 0) | {"seconds": 0.0} for b in BACKENDS}
        )
        functions.setdefault(r.file, set()).add(function(r))
        row["tests"] = len(functions[r.file])
        row[r.backend][r.outcome] += 1
        row[r.backend]["seconds"] = round(row[r.backend]["seconds"] + r.seconds, 2)
    return files


def table(files: dict[str, Any]) -> Table:
    shown = Table(title="\nBoth backends, side by side", title_justify="left", title_style="bold")
    shown.add_column("file")
    shown.add_column("tests", justify="right")
    for backend in BACKENDS:
        for name in ("passed", "failed", "differs", "s"):
            shown.add_column(f"{backend}\n{name}", justify="right")

    def cells(row: dict[str, Any]) -> list[str]:
        found = [str(row["tests"])]
        for backend in BACKENDS:
            of = row[backend]
            counts = (of["passed"], of["failed"] + of["skipped"], of["differs"])
            found += [*map(str, counts), f"{of['seconds']:.0f}"]
        return found

    for name, row in files.items():
        shown.add_row(name, *cells(row))
    whole: dict[str, Any] = {"tests": sum(row["tests"] for row in files.values())}
    for backend in BACKENDS:
        each = [row[backend] for row in files.values()]
        whole[backend] = {key: sum(of[key] for of in each) for key in (*OUTCOMES, "seconds")}
    shown.add_section()
    shown.add_row("all", *cells(whole))
    shown.caption = (
        "differs: cannot pass there, and has failed, for a reason that is listed; s: of the tests' own time"
    )
    shown.caption_justify = "left"
    return shown


def main(args: list[str]) -> int:
    os.environ["BYPASS_BACKENDS"] = "all"  # read by backends.py, also in the workers
    sys.path.insert(0, str(TESTS))
    import backends

    collect = Collect()
    marked = [
        str(path) for path in sorted(TESTS.glob("test_*.py")) if "pytest.mark.backends" in path.read_text()
    ]
    status = pytest.main(["-m", "backends", *args, *marked], plugins=[collect])
    results = list(collect.results.values())
    files = summed(results)
    wrong = [r for r in results if r.outcome in ("failed", "skipped")]
    alone = one_sided(results)
    document = {
        "files": files,
        "differences": backends.DIFFERENCES,
        "parts": backends.PARTS,
        "one backend only": alone,
        "wrong": [{"test": f"{r.file}::{r.name}", "outcome": r.outcome, "why": r.why} for r in wrong],
    }
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(document, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(files))
    console.print("\nWhat differs on DPDK:", style="bold")
    for name, why in backends.DIFFERENCES.items():
        console.print(f"  {name}: {why}", markup=False, soft_wrap=True)
    for why in backends.PARTS.values():
        console.print(f"  {why}", markup=False, soft_wrap=True)
    for what in (*(f"{r.file}::{r.name} has {r.outcome}" for r in wrong), *collect.errors):
        console.print(what, markup=False, style="red")
    for name in alone:
        console.print(f"{name} ran on one backend only", markup=False, style="red")
    console.print(f"all figures: {OUTPUT}")
    return 1 if wrong or alone or collect.errors or status != pytest.ExitCode.OK else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
