# SPDX-License-Identifier: Apache-2.0
"""iperf3 as server and as client: both directions, several streams, UDP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.apps.app import App, ServerApp
from bench.apps.launch import Grant
from bench.apps.place import where
from bench.programs import BenchError
from bypass.lab import CLIENT_IP, SERVER_IP

__all__ = ["IperfClient", "IperfServer"]

PORT = 5201
START_S = 20.0
BUSY = ("the server is busy", "unable to receive control message: Connection reset by peer")
TESTS = {
    "to the server": (),
    "to the client": ("-R",),
    "4 streams": ("-P", "4"),
    "4 streams to the client": ("-P", "4", "-R"),
    "both at once": ("--bidir",),
    "UDP": ("-u", "-b", "50M"),
    "UDP to the client": ("-u", "-b", "50M", "-R"),
}


def judged(said: str) -> dict[str, float]:
    """Of iperf3 -J: Mbit/s received, and the share of datagrams lost.

    Raises:
        BenchError: it says that something went wrong, or nothing arrived.
    """
    try:
        found = json.loads(said)
    except ValueError:
        raise BenchError(f"no JSON: {said[-300:]}") from None
    if "error" in found:
        raise BenchError(found["error"])
    end = found["end"]
    if "sum_received" not in end:  # UDP before 3.13
        end["sum_received"] = end["sum"]
    rate = float(end["sum_received"]["bits_per_second"])
    if rate <= 0 or end["sum_received"]["bytes"] <= 0:
        raise BenchError("nothing arrived")
    figures = {"mbit_per_s": round(rate / 1e6, 1)}
    if "lost_percent" in end.get("sum", {}):
        figures["lost_percent"] = round(float(end["sum"]["lost_percent"]), 3)
    return figures


class IperfServer(ServerApp):
    name = "iperf3-server"
    title = "iperf3 -s"
    needs = ("iperf3",)
    grants = (Grant(PORT), Grant(PORT, "udp"))
    rated = ("to the server", "mbit_per_s")
    unit = "Mbit/s"
    end_codes = (0, 1)  # "the server has terminated"

    def argv(self) -> list[str]:
        return [where("iperf3"), "-s", "-B", SERVER_IP, "-p", str(PORT)]

    def _wait_open(self, port: int) -> None:
        """A connection that says nothing would keep the only place that this server has: its own word is waited for."""
        argv = [where("iperf3"), "-c", SERVER_IP, "-p", str(PORT), "-n", "1", "-J"]
        deadline = time.monotonic() + START_S
        while self.server.alive() and time.monotonic() < deadline:
            if '"error"' not in self.place.client(argv, check=False):
                return
            time.sleep(0.05)
        raise BenchError(f"iperf3 -s does not answer: {self.server.said()}")

    def exercise(self) -> dict[str, Any]:
        seconds = self.place.count(5)
        figures = {}
        for title, options in TESTS.items():
            argv = [where("iperf3"), "-c", SERVER_IP, "-p", str(PORT), "-t", str(seconds), "-J", *options]
            figures[title] = self.attempt(f"iperf3 {title}", self._ask, argv)
        return figures

    def _ask(self, argv: list[str]) -> dict[str, float]:
        """(The server may be at the end of the test before: it says so, and closes with the question unread, which is a
        reset on Linux too.)"""
        deadline = time.monotonic() + START_S
        while True:
            said = self.place.client(argv, check=False)
            if not any(text in said for text in BUSY) or time.monotonic() > deadline:
                return judged(said)
            time.sleep(0.1)


class IperfClient(App):
    """The client is the program under test; the server is the kernel's."""

    name = "iperf3-client"
    title = "iperf3 -c"
    needs = ("iperf3",)
    grants = (Grant(PORT, remote=True), Grant(PORT, "udp", remote=True))
    rated = ("to the server", "mbit_per_s")
    unit = "Mbit/s"

    @contextmanager
    def session(self) -> Iterator[None]:
        server = self.place.background([where("iperf3"), "-s", "-B", CLIENT_IP, "-p", str(PORT)])
        try:
            yield
        finally:
            server.terminate()
            server.communicate(timeout=20)

    def exercise(self) -> dict[str, Any]:
        return {title: self.attempt(f"iperf3 {title}", self._run, o) for title, o in TESTS.items()}

    def _run(self, options: tuple[str, ...]) -> dict[str, float]:
        seconds = self.place.count(5)
        argv = [where("iperf3"), "-c", CLIENT_IP, "-p", str(PORT), "-t", str(seconds), "-J", *options]
        client = self.launcher.start(argv)
        code = client.process.wait(60 + seconds)
        client.end()
        figures = judged(client.log.read_text())
        if code != 0:
            raise BenchError(f"exit code {code}: {client.said()}")
        return figures
