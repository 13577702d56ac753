# SPDX-License-Identifier: Apache-2.0
"""`make test-oracle`: every script against this machine's kernel; what differs has to be registered.

    python tests/oracle.py [--ours [--strict]] [--jobs N] [--verbose] [SCRIPT ...]

A script runs in a child process with a network namespace of its own. A script that differs is run again, up to
`RETRIES` times: a busy machine makes real time unsteady, and a difference that counts is there each time.
tests/scripts/differences.yaml lists the scripts on which Linux does something else than the script says, with the line
and the reason; anything that is not listed, or is listed and does not differ, is a failure. At the end a table by topic
tells what our stack and Linux do; --ours plays the scripts on our stack only, without root.

Exit code: 0; 1: something is not as registered; 2: a script or a list cannot be read, or this is no place to run it.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from scripting.infos import CodeError  # noqa: E402
from scripting.lang import Script, ScriptError, load  # noqa: E402
from scripting.play import Player, Verdict  # noqa: E402

SCRIPTS = HERE / "scripts"
RETRIES = 4
JOBS = 12
LIMIT_S = 180  # for one run of a script
MOST = 0.05  # of the scripts may be registered as different


def all_scripts() -> list[Path]:
    return sorted(SCRIPTS.glob("*/*.pkt"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def topic_of(name: str) -> str:
    return name.partition("/")[0].replace("_", " ")


def play_ours(script: Script) -> Verdict:
    """On our stack, in this process."""
    from scripting.ours import OurStack

    try:
        backend = OurStack(script)
    except (OSError, CodeError) as e:
        return Verdict(False, why=f"no stack: {e}")
    ok = False
    try:
        verdict = Player(script, backend).play()
        ok = verdict.ok
    finally:
        leaks = backend.close(check=ok)
    return Verdict(False, why=f"left behind: {leaks}") if leaks else verdict


def play_linux(script: Script) -> Verdict:
    """On the kernel: moves this process into a new namespace.

    While it plays, it goes before ordinary processes where that is allowed: it nearly always sleeps, and its times
    count.
    """
    from scripting.linux import Linux

    backend = Linux(script)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    backend.begin_now()
    return Player(script, backend).play()


# ---- Registered differences ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Difference:
    """script: topic/name; line: the number of the line at which Linux differs; why: RFC clause or kernel reason."""

    script: str
    line: int
    why: str


class RegisterError(Exception):
    """differences.yaml or pending.yaml says something that makes no sense."""


class UnableError(Exception):
    """This is no place to play scripts on the kernel."""


def read_list(path: Path) -> list[dict[str, Any]]:
    raw = yaml.safe_load(path.read_text()) or []
    if not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw):
        raise RegisterError(f"{path.name}: a list of entries expected")
    return raw


def differences(path: Path = SCRIPTS / "differences.yaml") -> dict[str, Difference]:
    """By script. RegisterError."""
    found: dict[str, Difference] = {}
    for entry in read_list(path):
        if set(entry) != {"script", "line", "why"} or not str(entry.get("why", "")).strip():
            raise RegisterError(f"{path.name}: script, line and why expected: {entry}")
        if entry["script"] in found:
            raise RegisterError(f"{path.name}: {entry['script']} twice")
        found[entry["script"]] = Difference(**entry)
    return found


def pending(path: Path = SCRIPTS / "pending.yaml") -> dict[str, str]:
    """Scripts that Linux passes and our stack does not yet: what is missing. RegisterError."""
    found: dict[str, str] = {}
    for entry in read_list(path):
        if set(entry) != {"script", "missing"} or entry["script"] in found:
            raise RegisterError(f"{path.name}: script (once) and missing expected: {entry}")
        found[entry["script"]] = str(entry["missing"])
    return found


def complaints(verdicts: dict[str, Verdict], registered: dict[str, Difference], *, whole: bool) -> list[str]:
    """What is wrong with these verdicts of Linux beside the register. whole: they are of all scripts."""
    wrong = []
    for name, verdict in verdicts.items():
        entry = registered.get(name)
        if verdict.ok and entry is not None:
            wrong.append(f"{name}: registered as different, but Linux does what it says")
        elif not verdict.ok and entry is None:
            wrong.append(f"{name}: differs and is not registered: line {verdict.line}: {verdict.why}")
        elif entry is not None and entry.line != verdict.line:
            wrong.append(
                f"{name}: differs at line {verdict.line}, registered for line {entry.line}: {verdict.why}"
            )
    if whole:
        wrong += [
            f"{name}: registered, but there is no such script" for name in registered if name not in verdicts
        ]
        if len(registered) > MOST * len(verdicts):
            wrong.append(f"{len(registered)} of {len(verdicts)} scripts are registered: more than {MOST:.0%}")
    return wrong


# ---- Running -------------------------------------------------------------------------------------------------------
def _child(path: Path, pipe: Any) -> None:
    """Plays a script and sends the verdict. Never returns: threads may still hang in system calls."""
    try:
        verdict = play_linux(load(path))
    except ScriptError as e:
        verdict = Verdict(False, e.line, "", str(e))
    except BaseException as e:  # noqa: BLE001 - the parent reports it
        verdict = Verdict(False, 0, "", f"{type(e).__name__}: {e}")
    pipe.send(verdict)
    os._exit(0)


def run_linux(
    paths: Iterable[Path],
    *,
    expected: Mapping[str, int],
    jobs: int = JOBS,
    retries: int = RETRIES,
    report: Callable[[Path, Verdict, int], None],
) -> dict[str, Verdict]:
    """Plays scripts side by side. report(path, verdict, tries) for each as it ends.

    expected: the line at which a script is known to differ; what else differs is run again.
    """
    context = multiprocessing.get_context("fork")
    waiting = [(p, 1) for p in paths]
    running: dict[Any, tuple[Path, int, Any, float]] = {}
    done: dict[str, Verdict] = {}
    ended: list[Any] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            path, attempt = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(path, theirs))
            process.start()
            theirs.close()
            running[ours] = (path, attempt, process, time.monotonic())
        for pipe in list[Any](multiprocessing.connection.wait(list(running), timeout=1)):
            path, attempt, process, _ = running.pop(pipe)
            try:
                verdict: Verdict = pipe.recv()
            except EOFError:
                verdict = Verdict(False, 0, "", "the child ended without a verdict")
            ended.append(process)  # its namespace takes the kernel a while to clear up: nobody waits for it
            if verdict.ok or attempt > retries or expected.get(name_of(path)) == verdict.line:
                done[name_of(path)] = verdict
                report(path, verdict, attempt)
            else:
                waiting.append((path, attempt + 1))
        for pipe, (path, _, process, began) in list(running.items()):
            if time.monotonic() - began > LIMIT_S:
                process.kill()  # its pipe ends, and the loop above sees that
                running[pipe] = (path, RETRIES + 1, process, began)
    for process in ended:
        process.join()
    return done


def unable() -> str:
    """What is missing here to play scripts on the kernel; empty: nothing."""
    if os.geteuid() != 0:
        return "it makes a network namespace for each script, so it needs root (--ours does not)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "it needs TUN devices: /dev/net/tun is missing here, or not open to us (--ours needs none)"
    pid = os.fork()
    if pid == 0:
        try:
            from scripting.linux import CLONE_NEWNET, LIBC

            os._exit(LIBC.unshare(CLONE_NEWNET) != 0)
        except BaseException:  # noqa: BLE001 - a child must not go on as its parent
            os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        return "it may not make network namespaces here (--ours needs none)"
    return ""


def table(columns: Mapping[str, Mapping[str, bool]], registered: Mapping[str, Difference]) -> str:
    """By topic: how many scripts there are, how many do what they say on whom, how many differences are registered."""
    names = sorted({name for verdicts in columns.values() for name in verdicts})
    scripts, differ = Counter(map(topic_of, names)), Counter(topic_of(n) for n in registered if n in names)
    rows = [("topic", "scripts", *columns, "registered differences")]
    passed = [Counter(topic_of(n) for n, ok in verdicts.items() if ok) for verdicts in columns.values()]
    for topic in scripts:
        rows.append((topic, *(str(c[topic]) for c in (scripts, *passed, differ))))
    rows.append(("all", *(str(c.total()) for c in (scripts, *passed, differ))))
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = (
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, width, strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(cells) for cells in aligned)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Runs scripts against the kernel and compares with the register."
    )
    parser.add_argument(
        "scripts", nargs="*", type=Path, metavar="SCRIPT", help="files; all when none is named"
    )
    parser.add_argument("--ours", action="store_true", help="run them on our stack in place of Linux")
    parser.add_argument("--strict", action="store_true", help="with --ours: pending.yaml excuses nothing")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"scripts side by side ({JOBS})")
    parser.add_argument("--retries", type=int, default=RETRIES, help=f"of a script that differs ({RETRIES})")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="what was on the wire, also where all is well"
    )
    args = parser.parse_args(argv)
    paths = [p.resolve() for p in args.scripts] or all_scripts()
    begin = time.monotonic()

    def report(path: Path, verdict: Verdict, tries: int) -> None:
        tried = f" (run {tries})" if tries > 1 and verdict.ok else ""
        print(f"{name_of(path):50} {verdict}{tried}", flush=True)
        if args.verbose and verdict.ok:
            print("\n".join(f"    {line}" for line in verdict.trace))

    try:
        registered, waiting = differences(), {} if args.strict else pending()
        if args.ours:
            verdicts = {}
            for path in paths:
                verdicts[name_of(path)] = play_ours(load(path))
                report(path, verdicts[name_of(path)], 1)
            bad = [n for n, v in verdicts.items() if v.ok == (n in waiting)]
            if not args.scripts:
                print(table({"ours": {n: v.ok for n, v in verdicts.items()}}, registered))
            print(f"{len(verdicts)} scripts, {len(bad)} not as pending.yaml says: {', '.join(bad)}")
            return bool(bad)
        for path in paths:
            load(path)
        if why := unable():
            raise UnableError(why)
    except (ScriptError, RegisterError, UnableError, OSError) as e:
        print(f"oracle: {e}", file=sys.stderr)
        return 2
    expected = {name: entry.line for name, entry in registered.items()}
    verdicts = run_linux(paths, expected=expected, jobs=args.jobs, retries=args.retries, report=report)
    wrong = complaints(verdicts, registered, whole=not args.scripts)
    if not args.scripts:
        ours = {name_of(path): play_ours(load(path)).ok for path in paths}
        linux = {name: verdict.ok for name, verdict in verdicts.items()}
        print(table({"ours": ours, "Linux": linux}, registered))
    for line in wrong:
        print(f"oracle: {line}")
    agree = sum(v.ok for v in verdicts.values())
    print(
        f"oracle: Linux {os.uname().release}: {agree} of {len(verdicts)} scripts agree, {len(registered)} differences "
        f"registered, {len(wrong)} complaints, {time.monotonic() - begin:.0f} s"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
