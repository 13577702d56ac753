# SPDX-License-Identifier: Apache-2.0
"""One end of the mixed load as a process: `python -m bench.mixed.end {bypass|linux} FOLDER RATE MBIT`.

Both ends serve HTTP, iperf3 and short conversations, and are clients of the other's. FOLDER has files and digests.json
(name: SHA-256); RATE is short conversations a second, MBIT what an iperf3 test may take. Driven by JSON lines:

    {"do": "begin"}     the clients start
    {"do": "report"}    {"counts": {load: {what: n}}, "failed": n, "errors": [the first ones]}
    {"do": "stop"}      the clients finish what they are at; then as report
    {"do": "audit"}     bypass: {"stack", "frames", "states", "stats"}; linux: {"states": of the kernel's TCP sockets}
End of input ends it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import random
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import bypass
from bench import iperf3
from bench.mixed import talk, web
from bench.mixed.worlds import BypassWorld, LinuxWorld, World
from bypass.webserver import WebServer

WEB, SHORT, PYTHON_WEB, IPERF3 = 8080, 8081, 8082, 5201
ERRORS_KEPT = 20
SHORT_AT_ONCE = 200
TCP_STATES = {6: "TIME_WAIT", 10: "LISTEN"}  # of /proc/net/tcp; others by number
BROKEN = (
    OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, KeyError,
    talk.Wrong, web.WrongAnswer, iperf3.ProtocolError,
)  # fmt: skip


class End:
    """What both ends have in common: servers, clients of the same protocols, and the tally."""

    def __init__(self, world: World, folder: Path, rate: float, mbit: int) -> None:
        self.world = world
        self.folder = folder
        self.rate = rate
        self.mbit = mbit
        self.digests: dict[str, str] = json.loads((folder / "digests.json").read_text())
        self.counts: dict[str, Counter[str]] = {}
        self.errors: list[str] = []
        self.stopping = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.rng = random.Random(world.name)
        self.late_s = (
            0.0  # the longest time that the event loop was late: the process did not come to run, or worked
        )
        self.iperf3 = iperf3.Server()
        self.web = WebServer(folder)
        asyncio.get_running_loop().set_exception_handler(self._unhandled)

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.errors.append(f"{self.world.name}: {context.get('message')}: {context.get('exception')!r}")

    def count(self, load: str) -> Counter[str]:
        return self.counts.setdefault(load, Counter())

    # ---- servers
    async def serve(self, undo: AsyncExitStack) -> None:
        short = talk.Server(self.world, self.count("short server"), self.errors)
        for handle, port in self.servers(short):
            server = await self.world.serve(handle, port)
            undo.callback(server.close)

    def servers(self, short: talk.Server) -> list[tuple[Any, int]]:
        return [(self.web.handle, WEB), (short.handle, SHORT)]

    # ---- clients
    async def attempt(self, load: str, what: Awaitable[int]) -> None:
        """One unit of a load, counted; its bytes are what it returns."""
        try:
            self.count(load)["bytes"] += await what
            self.count(load)["done"] += 1
        except BROKEN as e:
            self.errors.append(f"{self.world.name}: {load}: {e!r}")

    async def pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    async def keep_at(self, load: str, unit: Callable[[], Awaitable[int]], pause_s: float) -> None:
        while not self.stopping.is_set():
            await self.attempt(load, unit())
            await self.pause(pause_s)

    async def short_clients(self) -> None:
        """Conversations at a steady rate, whatever each of them takes."""
        running: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not self.stopping.is_set():
            due = max(
                due + 1 / self.rate, time.monotonic() - 1
            )  # what is missed by more than a second is not made up
            await self.pause(max(0.0, due - time.monotonic()))
            if len(running) < SHORT_AT_ONCE:
                kind = talk.any_kind(self.rng)
                self.count("short client")[talk.KINDS[kind]] += 1
                one = talk.ask(self.world, SHORT, kind, self.rng)
                task = asyncio.create_task(self.attempt("short client", one))
                running.add(task)
                task.add_done_callback(running.discard)
            else:
                self.count("short client")["put off"] += 1
        await asyncio.gather(*running)

    def loads(self) -> list[Awaitable[None]]:
        return [self.short_clients()]

    async def _be_late(self) -> None:
        while not self.stopping.is_set():
            due = time.monotonic() + 0.05
            await self.pause(0.05)
            self.late_s = max(self.late_s, time.monotonic() - due)

    def an_iperf3_test(self) -> dict[str, Any]:
        """Arguments of a test, by chance."""
        parallel = self.rng.choice((1, 1, 3))
        return {
            "seconds": self.rng.choice((1, 3)), "parallel": parallel, "reverse": self.rng.random() < 0.5,
            "bit_s": self.mbit * 1_000_000 // parallel,
        }  # fmt: skip

    # ---- commands
    async def begin(self) -> dict[str, Any]:
        self.tasks = [asyncio.ensure_future(load) for load in (*self.loads(), self._be_late())]
        return {}

    async def report(self) -> dict[str, Any]:
        errors = self.errors + self.iperf3.errors
        self.count("web server")["done"] = self.web.requests
        return {
            "counts": self.counts,
            "late_s": round(self.late_s, 3),
            "failed": len(errors),
            "errors": errors[:ERRORS_KEPT],
        }

    async def stop(self) -> dict[str, Any]:
        self.stopping.set()
        for task in self.tasks:
            try:
                await task
            except Exception as e:  # noqa: BLE001 - a load of ours has a fault: it is told like any other error
                self.errors.append(f"{self.world.name}: a load ended: {e!r}")
        return await self.report()

    async def audit(self) -> dict[str, Any]:
        raise NotImplementedError


class BypassEnd(End):
    def __init__(self, stack: bypass.Stack, folder: Path, rate: float, mbit: int) -> None:
        super().__init__(BypassWorld(stack), folder, rate, mbit)
        self.stack = stack

    def servers(self, short: talk.Server) -> list[tuple[Any, int]]:
        return [*super().servers(short), (self.iperf3.handle, IPERF3)]

    def loads(self) -> list[Awaitable[None]]:
        return [
            *super().loads(),
            self.keep_at("http client", self._http, 0.1),
            self.keep_at("http client", self._http, 0.1),
            self.keep_at("iperf3 client", self._iperf3, 0.5),
        ]

    async def report(self) -> dict[str, Any]:
        self.count("iperf3 server")["done"] = self.iperf3.done
        return await super().report()

    async def _http(self) -> int:
        """A connection with some requests; the last says close, or nobody does and the client just closes."""
        port = self.rng.choice((WEB, PYTHON_WEB))
        requests, closes, total = self.rng.choice((1, 1, 2, 8)), self.rng.random() < 0.5, 0
        async with asyncio.timeout(60):
            reader, writer = await self.world.connect(self.world.peer, port)
            try:
                for i in range(requests):
                    name = self.rng.choice(list(self.digests))
                    close = closes and i == requests - 1
                    if port == WEB and self.rng.random() < 0.3:
                        path = self.folder / name
                        total += await web.put(
                            reader, writer, self.world.peer, path, self.digests[name], close=close
                        )
                    else:
                        sha256 = self.digests[name]
                        total += await web.get(reader, writer, self.world.peer, name, sha256, close=close)
                self.count("http client")["requests"] += requests
                return total
            finally:
                writer.close()
                await writer.wait_closed()

    async def _iperf3(self) -> int:
        test = self.an_iperf3_test()
        for _ in range(50):
            try:
                return (await iperf3.run_client(self.world.connect, self.world.peer, IPERF3, **test)).received
            except (iperf3.BusyError, ConnectionRefusedError):  # iperf3 does not listen between two tests
                self.count("iperf3 client")["server not ready"] += 1
                await self.pause(0.2)
        raise iperf3.ProtocolError("iperf3 -s does not take tests any more")

    async def audit(self) -> dict[str, Any]:
        driver: Any = self.stack.driver
        return {
            "stack": self.stack.audit(),
            "frames": dataclasses.asdict(driver.device.audit()),
            "states": Counter(c.state for c in self.stack.conns()),
            "stats": {k: v for k, v in self.stack.stats().items() if v},
        }


class LinuxEnd(End):
    def __init__(self, folder: Path, rate: float, mbit: int) -> None:
        super().__init__(LinuxWorld(), folder, rate, mbit)

    async def serve(self, undo: AsyncExitStack) -> None:
        await super().serve(undo)
        serve = ["-m", "http.server", str(PYTHON_WEB), "--bind", self.world.address, "--protocol", "HTTP/1.1"]
        for argv in (
            ["iperf3", "--server", "--bind", self.world.address, "--port", str(IPERF3)],
            [sys.executable, *serve, "--directory", str(self.folder)],
        ):
            child = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
            undo.push_async_callback(_end, child, argv[0], self.errors)
        for port in (PYTHON_WEB, IPERF3):
            await self._until_open(port)

    async def _until_open(self, port: int) -> None:
        for _ in range(200):
            if any(local == port for local, _, _ in _tcp_sockets()):
                return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"nobody listens at port {port}")

    def loads(self) -> list[Awaitable[None]]:
        return [
            *super().loads(),
            self.keep_at("curl", self._curl, 0.1),
            self.keep_at("curl", self._curl, 0.1),
            self.keep_at("iperf3 client", self._iperf3, 0.5),
        ]

    async def _output(self, *argv: str) -> tuple[bytes, int]:
        """What it wrote, standard error behind standard output, and its exit code."""
        child = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
        out, err = await child.communicate()
        return out + err, child.returncode or 0

    async def _curl(self) -> int:
        """Some files with one curl, which keeps its connection unless told otherwise; up or down."""
        names = self.rng.choices(list(self.digests), k=self.rng.choice((1, 1, 2, 8)))
        up, close = self.rng.random() < 0.3, self.rng.random() < 0.5
        argv = ["curl", "--silent", "--show-error", "--fail", "--max-time", "60"]
        argv += ["--header", "Connection: close"] if close else []
        with tempfile.TemporaryDirectory(prefix="got-", dir=self.folder) as got:
            for i, name in enumerate(names):
                argv += ["--output", f"{got}/{i}"]
                argv += ["--upload-file", str(self.folder / name)] if up else []
                argv.append(f"http://{self.world.peer}:{WEB}/{name}")
            out, code = await self._output(*argv)
            if code:
                raise ValueError(f"curl {' '.join(names)}: exit code {code}: {out.decode()}")
            total = 0
            for i, name in enumerate(names):
                body = Path(got, str(i)).read_bytes()
                digest = body.decode().strip() if up else hashlib.sha256(body).hexdigest()
                if digest != self.digests[name]:
                    raise web.WrongAnswer(f"curl: {name}: {len(body)} bytes with the wrong hash")
                total += (self.folder / name).stat().st_size
        self.count("curl")["requests"] += len(names)
        return total

    async def _iperf3(self) -> int:
        test = self.an_iperf3_test()
        argv = ["iperf3", "--json", "--client", self.world.peer, "--port", str(IPERF3)]
        argv += [
            "--time",
            str(test["seconds"]),
            "--parallel",
            str(test["parallel"]),
            "--bitrate",
            str(test["bit_s"]),
        ]
        argv += ["--reverse"] if test["reverse"] else []
        for _ in range(50):
            out, code = await self._output(*argv)
            answer: dict[str, Any] = (
                json.loads(out) if code == 0 else {"error": f"exit code {code}: {out[-500:].decode()}"}
            )
            if "busy" not in answer.get(
                "error", ""
            ):  # a test's last steps here may take longer than its client's
                break
            self.count("iperf3 client")["server not ready"] += 1
            await self.pause(0.2)
        if "error" in answer:
            raise ValueError(f"iperf3: {answer['error']}, {test}")
        end = answer["end"]
        sent, received = int(end["sum_sent"]["bytes"]), int(end["sum_received"]["bytes"])
        iperf3.Result(sent, received, test["seconds"], test["parallel"]).check()
        return received

    async def audit(self) -> dict[str, Any]:
        states = Counter(TCP_STATES.get(state, str(state)) for _, _, state in _tcp_sockets())
        return {"states": states, "stats": _tcp_counters()}


def _tcp_sockets() -> list[tuple[int, int, int]]:
    """This namespace's TCP sockets: local port, remote port, state."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = (line.split() for line in lines)
    return [(int(f[1].split(":")[1], 16), int(f[2].split(":")[1], 16), int(f[3], 16)) for f in fields]


def _tcp_counters() -> dict[str, int]:
    """What this namespace's TCP has counted, as far as it is not 0: `nstat` shows the same."""
    found: dict[str, int] = {}
    for file, kinds in (("snmp", ("Tcp:",)), ("netstat", ("TcpExt:",))):
        lines = [line.split() for line in Path("/proc/net", file).read_text().splitlines()]
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            if names[0] in kinds:
                found |= {k: int(v) for k, v in zip(names[1:], values[1:], strict=True) if int(v) > 0}
    return found


async def _end(child: asyncio.subprocess.Process, name: str, errors: list[str]) -> None:
    if child.returncode is not None:
        print(f"{name} ended by itself with {child.returncode}", file=sys.stderr)
        sys.exit(1)
    child.terminate()
    await child.wait()


async def drive(end: End) -> None:
    """Serves, and does what standard input says."""
    commands = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(commands)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    async with AsyncExitStack() as undo:
        await end.serve(undo)
        print(json.dumps({"ready": True}), flush=True)
        while line := await commands.readline():
            command = json.loads(line)["do"]
            print(json.dumps(await getattr(end, command)()), flush=True)


async def _bypass(stack: bypass.Stack, folder: Path, rate: float, mbit: int) -> None:
    await drive(BypassEnd(stack, folder, rate, mbit))


async def _linux(folder: Path, rate: float, mbit: int) -> None:
    await drive(LinuxEnd(folder, rate, mbit))


def main(which: str, folder: Path, rate: float, mbit: int) -> None:
    if which == "linux":
        asyncio.run(_linux(folder, rate, mbit))
        return
    with bypass.Stack.from_policy(folder / "policy.yaml") as stack:
        asyncio.run(_bypass(stack, folder, rate, mbit))


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in ("bypass", "linux"):
        sys.exit("usage: python -m bench.mixed.end {bypass,linux} FOLDER RATE MBIT")
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
