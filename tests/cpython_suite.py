# SPDX-License-Identifier: Apache-2.0
"""`make test-cpython`: CPython's own tests of sockets, on the kernel and on the stack's loopback: the same results.

    python tests/cpython_suite.py [--surface stack|kernel] [--control | --no-control] [MODULE ...]

Debian's interpreter and test suite (libpython3.11-testsuite), each module in a network namespace of its own that has
nothing but a loopback: first as they are, then with the preload library. A test whose result differs is run again,
alone, up to `RETRIES` times on both sides: a difference that counts is there each time. Then the control: with
BYPASS_BREAK=recv the library loses the last byte of what it receives, and the comparison has to notice that.

Printed: a table by module, every difference with what the test said, and the share of TCP and UDP sockets that were on
the stack, which has to be 90 % at least.

Exit code: 0; 1: results differ, the share is too small, or the control was not noticed; 2: something needed is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from preloaded import LIBRARY, Share, environment, read_share, run  # noqa: E402

PYTHON = "/usr/bin/python3"
CHILD = HERE / "cpython_child.py"
SUITE = Path("/usr/lib/python3.11/test")
WHOLE = ("test_socket", "test_selectors", "test_socketserver", "test_httplib")
MODULES = (
    *(f"test.{m}" for m in WHOLE),
    *sorted(f"test.test_asyncio.{p.stem}" for p in (SUITE / "test_asyncio").glob("test_*.py")),
)
CONTROL = (
    "test.test_socket",
    "test.test_socketserver",
    "test.test_httplib",
    "test.test_asyncio.test_streams",
)
LIMIT_S = 60.0  # of one test
CONTROL_LIMIT_S = 10.0  # who waits for a byte that does not come
MODULE_LIMIT_S = 900.0
STARTS = 12  # of one module: each test that hangs or crashes costs one
ENOUGH = 20  # differences of a module in the control
RETRIES = 2
JOBS = 6  # the tests wait much and compute little
LEAST_SHARE = 0.9
# Nothing but a loopback, for root and for others.
ALONE = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--net")

Outcomes = dict[str, tuple[str, str]]  # test: how it ended, what it said


@dataclass
class Run:
    """What the modules gave on one surface."""

    outcomes: dict[str, Outcomes] = field(default_factory=dict)  # by module
    share: Share = field(default_factory=Share)


def outcomes_of(record: Path) -> tuple[Outcomes, str | None, bool]:
    """From a child's record: results, the test that was begun and not ended, whether all of them were tried."""
    results: Outcomes = {}
    begun, done = None, False
    for line in record.read_text().splitlines() if record.exists() else []:
        what = json.loads(line)
        if "begin" in what:
            begun = what["begin"]
        elif "end" in what:
            results[what["end"]] = (what["outcome"], what["text"])
            begun = None
        else:
            done = True
    return results, begun, done


def play(
    module: str,
    surface: str,
    folder: Path,
    limit_s: float = LIMIT_S,
    only: Sequence[str] = (),
    enough: int | None = None,
    **env: str,
) -> Outcomes:
    """Every test of the module, with as many starts as that takes. enough: stop after so many that did not go well."""
    folder.mkdir(parents=True, exist_ok=True)
    record, share = folder / "record", folder.parent / "share"
    argv = [PYTHON, str(CHILD), module, str(record), str(limit_s), *(["--only", *only] if only else [])]
    settings = {**environment(surface, share, **env), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder)}
    # The tools that build the namespace are not to be preloaded: env(1) sets the library behind them.
    behind = [f"{k}={v}" for k, v in settings.items() if k.startswith(("BYPASS_", "LD_PRELOAD"))]
    before = {k: v for k, v in settings.items() if not k.startswith(("BYPASS_", "LD_PRELOAD"))}
    inside = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", "env", *behind, *argv]
    results: Outcomes = {}
    for _ in range(STARTS):
        ended = run([*ALONE, *inside], before, MODULE_LIMIT_S, cwd=folder, orphans=False)
        results, begun, done = outcomes_of(record)
        if begun is not None:
            how = "hang" if "Timeout (" in ended.err or ended.status is None else f"ended with {ended.status}"
            results[begun] = (how, ended.err[-3000:])
            with record.open("a") as f:
                f.write(json.dumps({"end": begun, "outcome": how, "text": ended.err[-3000:]}) + "\n")
        elif not done:
            return results | {module: (f"ended with {ended.status}", ended.err[-3000:])}
        if done or (enough is not None and sum(went_wrong(o) for o, _ in results.values()) >= enough):
            return results
    return results | {module: ("given up", f"{STARTS} starts did not get through it")}


def went_wrong(outcome: str) -> bool:
    return outcome not in ("ok", "skip", "expected failure")


def play_all(modules: Iterable[str], surface: str, folder: Path, **how: object) -> Run:
    done = Run()
    with ThreadPoolExecutor(JOBS) as pool:
        jobs = {m: pool.submit(play, m, surface, folder / m, **how) for m in modules}  # type: ignore[arg-type]
        for module, job in jobs.items():
            done.outcomes[module] = job.result()
    done.share = read_share(folder / "share")
    return done


def differing(plain: Outcomes, ours: Outcomes) -> list[str]:
    """Tests that ended otherwise, or on one side only. What they said may differ: it tells addresses and times."""
    nothing = ("not run", "")
    return sorted(
        t for t in plain.keys() | ours.keys() if plain.get(t, nothing)[0] != ours.get(t, nothing)[0]
    )


def steady(module: str, tests: list[str], plain: Run, ours: Run, surface: str, folder: Path) -> list[str]:
    """Those that differ each time they are tried again, alone; the others were the machine's unrest."""
    for n in range(RETRIES):
        if not tests:
            break
        again = [play(module, s, folder / f"again{n}-{s}" / module, only=tests) for s in ("kernel", surface)]
        tests = [t for t in tests if t in differing(*again)]
        for t in tests:
            ours.outcomes[module][t] = again[1].get(t, ours.outcomes[module].get(t, ("not run", "")))
    return tests


def table(runs: dict[str, Run], differences: dict[str, list[str]]) -> Table:
    it = Table("module", "tests", "ok", "skip", "other on the kernel", "differ")
    for module, plain in runs["kernel"].outcomes.items():
        n = Counter(o for o, _ in plain.values())
        rest = len(plain) - n["ok"] - n["skip"]
        row = (len(plain), n["ok"], n["skip"], rest, len(differences[module]))
        it.add_row(module.removeprefix("test."), *map(str, row))
    return it


def compare(modules: Sequence[str], surface: str, folder: Path, console: Console) -> bool:
    """Both surfaces, and what differs. True: nothing, and enough was on the stack."""
    runs = {}
    for name, side in (("kernel", "kernel"), ("other", surface)):
        console.print(f"{len(modules)} modules, {'as they are' if name == 'kernel' else 'preloaded'} ...")
        runs[name] = play_all(modules, side, folder / name)
    differences = {}
    for module in modules:
        found = differing(runs["kernel"].outcomes[module], runs["other"].outcomes[module])
        differences[module] = steady(module, found, runs["kernel"], runs["other"], surface, folder)
    console.print(table(runs, differences))
    for module, tests in differences.items():
        for t in tests:
            kernel, ours = (runs[r].outcomes[module].get(t, ("not run", "")) for r in ("kernel", "other"))
            console.print(f"[bold]{t}[/]: {kernel[0]} on the kernel, {ours[0]} on the stack")
            console.print((ours[1] or kernel[1])[-1500:], markup=False, highlight=False)
    same = not any(differences.values())
    console.print("same results" if same else f"{sum(map(len, differences.values()))} tests differ")
    if surface == "kernel":
        return same
    share = runs["other"].share
    console.print(f"{share.processes} processes: {share}")
    if share.ratio < LEAST_SHARE:
        console.print(f"that is less than {LEAST_SHARE:.0%}")
    return same and share.ratio >= LEAST_SHARE


def control_is_noticed(modules: Sequence[str], folder: Path, console: Console) -> bool:
    """With a broken recv() every one of these modules has tests that do not pass."""
    ours = play_all(
        modules, "stack", folder / "control", limit_s=CONTROL_LIMIT_S, enough=ENOUGH, BYPASS_BREAK="recv"
    )
    noticed = {m: sum(went_wrong(o) for o, _ in ours.outcomes[m].values()) for m in modules}
    for module, n in noticed.items():
        console.print(f"control, recv() broken: {module.removeprefix('test.')}: {n} tests notice it")
    return all(noticed.values())


def needed(surface: str, with_control: bool) -> list[str]:
    what = []
    if not (SUITE / "test_socket.py").exists():
        what.append("CPython's tests: apt-get install libpython3.11-testsuite")
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).returncode != 0:
        what.append("network namespaces: root, or user namespaces for everybody")
    if (surface == "stack" or with_control) and not LIBRARY.exists():
        what.append(f"{LIBRARY}: make build")
    return what


@click.command()
@click.argument("modules", nargs=-1)
@click.option(
    "--surface",
    type=click.Choice(["stack", "kernel"]),
    default="stack",
    help="What the kernel is compared with.",
)
@click.option(
    "--control/--no-control", default=True, help="Also run with a broken recv(), which must be noticed."
)
@click.option("--only-control", is_flag=True, help="Nothing but the control.")
def main(modules: tuple[str, ...], surface: str, control: bool, only_control: bool) -> None:
    """CPython's tests of sockets on the kernel and on the stack: the same results."""
    console = Console(width=140)
    with_control = only_control or (control and surface == "stack")
    missing = needed(surface, with_control)
    if missing:
        click.echo("\n".join(f"test-cpython: missing: {m}" for m in missing), err=True)
        sys.exit(2)
    chosen = tuple(m if m.startswith("test.") else f"test.{m}" for m in modules) or MODULES
    good = True
    with tempfile.TemporaryDirectory(prefix="bypass-cpython-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        if not only_control:
            good = compare(chosen, surface, folder, console)
        if with_control:
            watched = [m for m in CONTROL if m in chosen] or CONTROL
            noticed = control_is_noticed(watched, folder, console)
            console.print(
                "the control was noticed"
                if noticed
                else "the control was NOT noticed: a broken recv() passes"
            )
            good = good and noticed
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
