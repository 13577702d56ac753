# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.mixed`: minutes of mixed load with Linux at the other end of a veth, then: was there an error, is
anything left over? Writes build/mixed.json; exit code 1 when the answer is yes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from bench.command import save, start
from bench.mixed.end import IPERF3, PYTHON_WEB, SHORT, WEB
from bench.mixed.leftovers import Memory, bpf_objects, descendants, still_there
from bench.programs import ROOT, BenchError
from bypass import __version__, netns, probe
from bypass.lab import CLIENT_IP, SERVER_IFNAME, SERVER_IP, Lab

TIME_WAIT_S = 60
SETTLE_S = 20.0  # for what is on its way when the clients have stopped
ANSWER_S = (
    150  # an end's answer to a command: the longest thing that a load may be at when it is told to stop
)
SIZES = (0, 1, 1447, 1448, 1449, 20_000, 65_536, 100_000, 1_000_000, 8_000_000)

POLICY = f"""
version: 1
interface: {SERVER_IFNAME}
backend: {{kind: afxdp, mode: auto}}
stack: {{conns: 4096, time_wait: 20000, socks: 30000}}
flows:
  - {{name: web, match: {{proto: tcp, local: {SERVER_IP}, local_port: {WEB}-{SHORT}}}, action: steer}}
  - {{name: iperf3, match: {{proto: tcp, local: {SERVER_IP}, local_port: {IPERF3}}}, action: steer}}
  - {{name: out, match: {{proto: tcp, remote: {CLIENT_IP}, remote_port: {WEB}-{PYTHON_WEB}}}, action: steer}}
  - {{name: out-iperf3, match: {{proto: tcp, remote: {CLIENT_IP}, remote_port: {IPERF3}}}, action: steer}}
"""


def missing() -> list[str]:
    """What the machine lacks; empty: nothing."""
    tools = [
        f"{name} (apt-get install {name})" for name in ("curl", "iperf3", "bpftool") if not shutil.which(name)
    ]
    return tools or probe.missing_for_xdp()


def make_files(folder: Path) -> None:
    rng = random.Random(1)
    digests = {}
    for size in SIZES:
        body = rng.randbytes(size)
        (folder / f"{size}.bin").write_bytes(body)
        digests[f"{size}.bin"] = hashlib.sha256(body).hexdigest()
    (folder / "digests.json").write_text(json.dumps(digests))
    (folder / "policy.yaml").write_text(POLICY)


class EndProcess:
    """An end of the load (bench.mixed.end) in its namespace; a context manager that ends it in order."""

    def __init__(self, lab: Lab, side: str, which: str, folder: Path, rate: float, mbit: int) -> None:
        self.which = which
        argv = [sys.executable, "-m", "bench.mixed.end", which, str(folder), str(rate), str(mbit)]
        self.process = subprocess.Popen(
            lab.command(side, argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            start_new_session=True,  # an interrupt is for this process, which then ends them in order
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """BenchError: it ended, or says nothing."""
        assert self.process.stdout is not None
        signal.alarm(ANSWER_S)
        try:
            line = self.process.stdout.readline()
        finally:
            signal.alarm(0)
        if not line:
            raise BenchError(f"the {self.which} end ended with exit code {self.process.wait(10)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what}) + "\n")
        self.process.stdin.flush()

    def do(self, what: str) -> dict[str, Any]:
        self.tell(what)
        return self.answer()

    def end(self) -> int:
        """Its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(30)

    def __enter__(self) -> EndProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None and not stream.closed:
                stream.close()


class Run:
    """One run. `problems` is the verdict: empty is good."""

    def __init__(self, minutes: float, rate: float, mbit: int) -> None:
        self.seconds = minutes * 60
        self.rate = rate
        self.mbit = mbit
        self.problems: list[str] = []
        self.result: dict[str, Any] = {}
        self.interrupted = False
        self.pid = os.getpid()

    def interrupt(self, signum: int, frame: object) -> None:
        """As a signal handler: the load ends, what follows it is done as ever."""
        if os.getpid() != self.pid:  # a child that pyroute2 forked, and ends that way
            os._exit(1)
        self.interrupted = True
        click.echo("interrupted: ending in order")

    def go(self) -> None:
        with ExitStack() as undo:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="bypass-mixed-")))
            make_files(folder)
            lab = Lab(f"{os.getpid()}-mixed")
            undo.callback(self._check_namespaces, lab)
            undo.enter_context(lab)
            linux = undo.enter_context(EndProcess(lab, "client", "linux", folder, self.rate, self.mbit))
            linux.answer()
            ours = undo.enter_context(EndProcess(lab, "server", "bypass", folder, self.rate, self.mbit))
            ours.answer()
            before = ours.do("audit")
            memory = Memory(ours.process.pid)
            self._load(ours, linux, memory)
            reports = self._stop(ours, linux)
            after = self._settle(ours, before)
            self.result |= {
                "before": before,
                "after": after,
                "memory": memory.judge(),
                "kernel": linux.do("audit"),
            }
            self.result |= {
                "ends": reports,
                "samples_mb": [[round(at), n >> 20] for at, n in memory.samples[::15]],
            }
            self._judge(before, after, reports)
            self._end(lab, ours, linux)

    # ---- load
    def _load(self, ours: EndProcess, linux: EndProcess, memory: Memory) -> None:
        for end in (linux, ours):
            end.do("begin")
        began = told = time.monotonic()
        while (now := time.monotonic()) - began < self.seconds and not self.interrupted:
            time.sleep(min(1.0, max(0.0, self.seconds - (now - began))))
            memory.look()
            if time.monotonic() - told >= 15:
                told = time.monotonic()
                self._progress(told - began, ours, linux, memory)
        self.result["load_s"] = round(time.monotonic() - began, 1)

    def _progress(self, at: float, ours: EndProcess, linux: EndProcess, memory: Memory) -> None:
        them, us, audit = linux.do("report"), ours.do("report"), ours.do("audit")
        served, asked = them["counts"], us["counts"]
        gigabytes = sum(c.get("bytes", 0) for r in (them, us) for c in r["counts"].values()) / 1e9
        click.echo(
            f"{at:5.0f} s: curl {served['curl'].get('requests', 0)}, http {asked['http client'].get('requests', 0)}, "
            f"iperf3 {asked['iperf3 server']['done']}+{asked['iperf3 client'].get('done', 0)}, "
            f"short {served['short client'].get('done', 0)}+{asked['short client'].get('done', 0)}, "
            f"{gigabytes:.1f} GB; connections {audit['stack']['conns']}, frames {audit['stack']['frames']}, "
            f"memory {memory.samples[-1][1] >> 20} MiB; errors {them['failed'] + us['failed']}"
        )

    def _stop(self, ours: EndProcess, linux: EndProcess) -> dict[str, Any]:
        for end in (linux, ours):
            end.tell("stop")  # both at once: each one's loads need the other's servers, which go on
        return {"linux": linux.answer(), "bypass": ours.answer()}

    # ---- verdict
    def _settle(self, ours: EndProcess, before: dict[str, Any]) -> dict[str, Any]:
        """The audit when everything has ended. After a run of a minute and more: TIME_WAIT as well."""
        wait_out = self.seconds >= 60 and not self.interrupted
        deadline = time.monotonic() + SETTLE_S + (TIME_WAIT_S if wait_out else 0)
        while True:
            after = ours.do("audit")
            if self._differences(before, after, wait_out) == [] or time.monotonic() > deadline:
                self.problems += self._differences(before, after, wait_out)
                return after
            time.sleep(0.25)

    @staticmethod
    def _differences(before: dict[str, Any], after: dict[str, Any], wait_out: bool) -> list[str]:
        now = dict(after["stack"])
        waiting = 0 if wait_out else after["states"].get("TIME_WAIT", 0)
        for what in ("conns", "timers"):
            now[what] -= waiting
        found = [
            f"stack: {k}: {v} at the start, {now[k]} at the end"
            for k, v in before["stack"].items()
            if now[k] != v
        ]
        found += [
            f"frames: {k}: {v} at the start, {after['frames'][k]} at the end"
            for k, v in before["frames"].items()
            if k in ("stack", "tx", "stack_tx", "misplaced", "bad_free", "conserved")
            and after["frames"][k] != v
        ]
        return found

    def _judge(self, before: dict[str, Any], after: dict[str, Any], reports: dict[str, Any]) -> None:
        for name, report in reports.items():
            self.problems += [f"{name}: {text}" for text in report["errors"]]
            more = report["failed"] - len(report["errors"])
            if more > 0:
                self.problems.append(f"{name}: {more} more errors")
            for load, counts in report["counts"].items():
                if not counts.get("done") and load != "short server":
                    self.problems.append(f"{name}: {load}: nothing was done")
        if self.result["memory"]["grew"]:
            self.problems.append(f"memory grew: {self.result['memory']}")
        open_ones = {
            k: n for k, n in self.result["kernel"]["states"].items() if k not in ("LISTEN", "TIME_WAIT")
        }
        if open_ones:
            self.problems.append(f"linux: sockets are still open: {open_ones}")

    def _end(self, lab: Lab, ours: EndProcess, linux: EndProcess) -> None:
        """Ends both and looks for what is left of them."""
        held = {pid: name for end in (ours, linux) for pid, name in descendants(end.process.pid).items()}
        objects = set().union(*(bpf_objects(pid) for pid in descendants(ours.process.pid)))
        self.result["bpf_objects"], self.result["processes"] = len(objects), len(held)
        if not objects:
            self.problems.append("no BPF objects were seen: nothing was steered")
        for end in (ours, linux):
            if code := end.end():
                self.problems.append(f"the {end.which} end: exit code {code}")
        self.problems += [f"a process is left: {held[p]} ({p})" for p in held if Path(f"/proc/{p}").exists()]
        for ns in lab.namespaces:
            self.problems += [
                f"a process is left in {ns}: {name} ({pid})" for pid, name in netns.processes(ns).items()
            ]
        self.problems += [f"BPF {kind} {number} is left" for kind, number in sorted(still_there(objects))]

    def _check_namespaces(self, lab: Lab) -> None:
        self.problems += [f"namespace {ns} is left" for ns in lab.namespaces if netns.exists(ns)]


@click.command()
@click.option(
    "--minutes", type=click.FloatRange(0.05, 24 * 60), default=10, show_default=True, help="Of load."
)
@click.option("--rate", type=click.FloatRange(1, 2000), default=100, show_default=True,
              help="Short conversations a second, each way.")  # fmt: skip
@click.option("--mbit", type=click.IntRange(1, 10_000), default=100, show_default=True,
              help="What an iperf3 test may take, Mbit/s.")  # fmt: skip
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), default=ROOT / "build" / "mixed.json",
    help="Where the figures go.",
)  # fmt: skip
def main(minutes: float, rate: float, mbit: int, output: Path) -> None:
    """Mixed load between the bypass stack and Linux, each the other's client and server: curl and HTTP with hashes
    compared, iperf3 in both directions, short connections that end in every way.

    Exit code 0: no error and nothing left over; 1: something; 2: it could not be run; 130: interrupted, in order.
    """
    if lacking := missing():
        raise BenchError(f"missing: {'; '.join(lacking)}")
    run = Run(minutes, rate, mbit)
    signal.signal(signal.SIGALRM, _too_long)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.interrupt)
    try:
        run.go()
    except BenchError as e:
        run.problems.append(str(e))
    result = {
        "version": 1,
        "bypass": __version__,
        "minutes": minutes,
        "rate": rate,
        "mbit": mbit,
        **run.result,
    }
    result |= {"interrupted": run.interrupted, "problems": run.problems, "ok": not run.problems}
    save(result, output)
    for problem in run.problems[:40]:
        click.echo(f"  wrong: {problem}", err=True)
    click.echo("no error, nothing left over" if not run.problems else f"{len(run.problems)} problems")
    click.echo(f"all figures: {output}")
    sys.exit(1 if run.problems else 130 if run.interrupted else 0)


def _too_long(signum: int, frame: object) -> None:
    raise BenchError(f"no answer for {ANSWER_S} s")


if __name__ == "__main__":
    start(main, "mixed")
