# SPDX-License-Identifier: Apache-2.0
"""memcached with four threads: values of every size over many connections, compared; its own counters agree."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, ClassVar

from bench.apps.app import ServerApp
from bench.apps.launch import Grant
from bench.apps.place import where
from bench.programs import BenchError
from bypass.lab import SERVER_IP

__all__ = ["Memcached"]

PORT = 11211
CONNECTIONS = 16  # of each thread of the client
SIZES = (0, 1, 100, 1448, 1449, 10_000, 200_000)


class Connection:
    """memcached's text protocol (protocol.txt)."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")

    def close(self) -> None:
        self._file.close()
        self._sock.close()

    def _line(self) -> bytes:
        line: bytes = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError("memcached closed the connection")
        return line[:-2]

    def set(self, key: str, value: bytes) -> None:
        self._sock.sendall(b"set %b 0 0 %d\r\n%b\r\n" % (key.encode(), len(value), value))
        if (answer := self._line()) != b"STORED":
            raise BenchError(f"set {key}: {answer!r}")

    def get(self, key: str) -> bytes | None:
        self._sock.sendall(f"get {key}\r\n".encode())
        value = None
        while (line := self._line()) != b"END":
            if not line.startswith(b"VALUE "):
                raise BenchError(f"get {key}: {line!r}")
            length = int(line.split()[3])
            value = self._file.read(length + 2)[:-2]
        return value

    def stats(self) -> dict[str, str]:
        self._sock.sendall(b"stats\r\n")
        found = {}
        while (line := self._line().decode()) != "END":
            _, name, value = line.split(" ", 2)
            found[name] = value
        return found


class Memcached(ServerApp):
    name = "memcached"
    title = "memcached, 4 threads"
    needs = ("memcached",)
    grants = (Grant(PORT),)
    rated = ("asked_per_s",)
    unit = "asked/s"
    threads: ClassVar[int] = 4

    def argv(self) -> list[str]:
        return [
            where("memcached"), "-l", SERVER_IP, "-p", str(PORT), "-U", "0", "-t", str(self.threads), "-m", "256",
        ]  # fmt: skip

    def exercise(self) -> dict[str, Any]:
        trouble: list[str] = []
        rounds = self.place.count(100, 3)

        def load(number: int) -> None:
            try:
                self._talk(number, rounds)
            except (OSError, EOFError, BenchError) as e:
                trouble.append(f"client {number}: {e!r}")

        threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        self.problems += trouble
        connection = Connection(self.place.connect(PORT))
        stats = connection.stats()
        connection.close()
        asked = 4 * CONNECTIONS * rounds
        self.expect(stats["threads"] == str(self.threads), f"{stats['threads']} threads")
        for name in ("cmd_set", "cmd_get", "get_hits"):
            self.expect(int(stats[name]) == asked, f"{name} is {stats[name]} and should be {asked}")
        figures = {name: int(stats[name]) for name in ("cmd_get", "cmd_set", "total_connections")}
        return figures | {"asked_per_s": round(2 * asked / seconds)}

    def _talk(self, number: int, rounds: int) -> None:
        rng = random.Random(number)
        there = [Connection(self.place.connect(PORT)) for _ in range(CONNECTIONS)]
        for turn in range(rounds):
            values = [rng.randbytes(rng.choice(SIZES)) for _ in there]
            for i, (connection, value) in enumerate(zip(there, values, strict=True)):
                connection.set(f"{number}-{i}", value)
            rng.shuffle(there)  # asked for on another connection than it was written on
            for i, (connection, value) in enumerate(zip(there, values, strict=True)):
                if connection.get(f"{number}-{i}") != value:
                    raise BenchError(f"round {turn}: not the value that was written")
        for connection in there:
            connection.close()
