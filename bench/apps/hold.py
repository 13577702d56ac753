# SPDX-License-Identifier: Apache-2.0
"""Holds many connections to a Redis: `python hold.py ADDRESS PORT COUNT`. Opens them, asks on each one, again and
again in other orders, and prints one JSON object."""

from __future__ import annotations

import json
import random
import select
import socket
import sys
import time
from typing import Any

ROUNDS = 3
PATIENCE_S = 60.0
BATCH = 500  # questions on their way at once: the server's backlog and queues are not what is tried here


def opened(address: str, port: int, count: int, problems: list[str]) -> list[socket.socket]:
    held = []
    for _ in range(count):
        try:
            held.append(socket.create_connection((address, port), timeout=PATIENCE_S))
        except OSError as e:
            problems.append(f"connection {len(held) + 1}: {e}")
            break
    return held


def asked(held: list[socket.socket], problems: list[str]) -> int:
    """How many answered."""
    good = 0
    for at in range(0, len(held), BATCH):
        batch = {sock.fileno(): sock for sock in held[at : at + BATCH]}
        poll = select.poll()
        for sock in batch.values():
            sock.sendall(b"PING\r\n")
            poll.register(sock, select.POLLIN)
        deadline = time.monotonic() + PATIENCE_S
        while batch and time.monotonic() < deadline:
            for fd, _ in poll.poll(1000):
                answer = batch.pop(fd).recv(64)
                poll.unregister(fd)
                good += answer == b"+PONG\r\n"
                if answer != b"+PONG\r\n":
                    problems.append(f"answered {answer!r}")
        if batch:
            problems.append(f"{len(batch)} connections did not answer within {PATIENCE_S:g} s")
            break
    return good


def main(address: str, port: int, count: int) -> dict[str, Any]:
    problems: list[str] = []
    began = time.monotonic()
    held = opened(address, port, count, problems)
    opened_s = time.monotonic() - began
    rng = random.Random(3)
    began = time.monotonic()
    answered = 0
    for _ in range(ROUNDS):
        rng.shuffle(held)
        answered += asked(held, problems)
    if answered != ROUNDS * len(held):
        problems.append(f"{answered} answers to {ROUNDS * len(held)} questions")
    found = {
        "held": len(held), "opened_s": round(opened_s, 2), "asked_s": round(time.monotonic() - began, 2),
        "problems": problems[:10],
    }  # fmt: skip
    for sock in held:
        sock.close()
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
