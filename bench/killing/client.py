# SPDX-License-Identifier: Apache-2.0
"""The peers of a server that is going to be killed: `python client.py ADDRESS PORT KEPT REQUEST ANSWER`.

Asks over new connections all the time and over KEPT connections that it had before. REQUEST and the beginning of its
ANSWER are hexadecimal. Prints "ready" when all kept ones were answered once, goes on until its input ends, and prints
one JSON object: times are of CLOCK_MONOTONIC, seconds.

    probes   [begun, ended, result]: served; refused (the kernel's reset to a SYN); reset, eof (after it was open);
             silence (no answer to the SYN); unanswered (open, but the request was not answered)
    kept     answers: times of answers; ended: [time, "reset" or "eof"], or null
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from typing import Any

SYN_S = 0.02  # on a veth an answer takes microseconds
ANSWER_S = 0.05
AGAIN_S = 0.01
PAUSE_S = 0.002
MOST = 1 << 16


def probe(where: tuple[str, int], request: bytes, answer: bytes) -> str:
    sock = socket.socket()
    try:
        sock.settimeout(SYN_S)
        try:
            sock.connect(where)
        except TimeoutError:
            return "silence"
        except ConnectionRefusedError:
            return "refused"
        except ConnectionResetError:
            return "reset"
        sock.settimeout(ANSWER_S)
        try:
            sock.sendall(request)
            got = sock.recv(MOST)
        except TimeoutError:
            return "unanswered"
        except (ConnectionResetError, BrokenPipeError):
            return "reset"
        if not got:
            return "eof"
        return "served" if got.startswith(answer) else f"answered {got[:40]!r}"
    finally:
        sock.close()


class Kept:
    """A connection that asks all the time: when it was answered, and when it was not for a while. (The request that a
    killed server had taken is lost, and TCP sends it again after 200 ms: who says nothing more hears nothing before.)
    """

    def __init__(self, where: tuple[str, int], request: bytes) -> None:
        self.sock = socket.create_connection(where, 5)
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request = request
        self.asked = 0.0
        self.waiting = False
        self.answers: list[float] = []
        self.ended: tuple[float, str] | None = None

    def turn(self) -> None:
        """Takes an answer that is there, and asks. (An answer is small: it comes in one piece.)"""
        if self.ended:
            return
        try:
            open_still = self._take()
            if open_still and (not self.waiting or time.monotonic() - self.asked > AGAIN_S):
                self.asked = time.monotonic()
                self.sock.sendall(self.request)
                self.waiting = True
        except (ConnectionResetError, BrokenPipeError):
            self.ended = (time.monotonic(), "reset")

    def _take(self) -> bool:
        """False: it has ended."""
        try:
            got = self.sock.recv(MOST)
        except BlockingIOError:
            return True
        if not got:
            self.ended = (time.monotonic(), "eof")
            return False
        self.waiting = False
        self.answers.append(time.monotonic())
        return True

    def document(self) -> dict[str, Any]:
        return {"answers": self.answers, "ended": self.ended}


def main(address: str, port: int, count: int, request: bytes, answer: bytes) -> dict[str, Any]:
    where = (address, port)
    kept = [Kept(where, request) for _ in range(count)]
    probes: list[tuple[float, float, str]] = []
    ready = False
    while not select.select([sys.stdin], [], [], 0)[0]:
        for connection in kept:
            connection.turn()
        began = time.monotonic()
        result = probe(where, request, answer)
        probes.append((began, time.monotonic(), result))
        if not ready and all(connection.answers for connection in kept):
            ready = True
            print("ready", flush=True)
        time.sleep(PAUSE_S)
    for connection in kept:
        connection.turn()
        connection.sock.close()
    return {"probes": probes, "kept": [c.document() for c in kept], "ended": time.monotonic()}


if __name__ == "__main__":
    found = main(
        sys.argv[1],
        int(sys.argv[2]),
        int(sys.argv[3]),
        bytes.fromhex(sys.argv[4]),
        bytes.fromhex(sys.argv[5]),
    )
    print(json.dumps(found))
