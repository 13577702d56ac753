# SPDX-License-Identifier: Apache-2.0
"""redis-server: redis-benchmark, background saves (a child by fork) under load, the data afterwards; and as many
connections as its descriptors allow."""

from __future__ import annotations

import csv
import random
import resource
import sys
import time
from typing import Any, ClassVar

from bench.apps.app import ServerApp
from bench.apps.launch import Grant
from bench.apps.place import where
from bench.programs import ROOT, BenchError, run_json
from bypass.lab import SERVER_IP

__all__ = ["Redis", "RedisMany", "Resp"]

PORT = 6379
COMMANDS = "ping_mbulk,set,get,incr,lpush,rpop,sadd,hset,lrange_100,mset"
SAVE_S = 60.0


class RespError(BenchError):
    """The server answered with an error."""


class Resp:
    """A connection that speaks RESP2: call() sends a command and gives its answer, bytes, int, list or None."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")

    def __enter__(self) -> Resp:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._sock.close()

    def send(self, *command: bytes | str | int) -> None:
        words = [w if isinstance(w, bytes) else str(w).encode() for w in command]
        self._sock.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words))

    def answer(self) -> Any:
        """Raises: RespError, EOFError."""
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError("the server closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise RespError(rest.decode())
        if kind == b":":
            return int(rest)
        if kind == b"*":
            return [self.answer() for _ in range(int(rest))]
        if kind == b"$":
            return self._bulk(int(rest))
        return rest

    def _bulk(self, length: int) -> bytes | None:
        if length < 0:
            return None
        body: bytes = self._file.read(length + 2)
        if len(body) != length + 2:
            raise EOFError("the server closed the connection inside of an answer")
        return body[:-2]

    def call(self, *command: bytes | str | int) -> Any:
        self.send(*command)
        return self.answer()

    def info(self, section: str) -> dict[str, str]:
        lines = self.call("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)


class Redis(ServerApp):
    name = "redis"
    title = "redis-server"
    needs: ClassVar[tuple[str, ...]] = ("redis-server", "redis-benchmark", "redis-check-rdb")
    grants = (Grant(PORT),)
    rated: ClassVar[tuple[str, ...]] = ("get",)
    unit = "GET/s"
    clients: ClassVar[int] = 10_000

    def argv(self) -> list[str]:
        return [
            where("redis-server"), "--bind", SERVER_IP, "--port", str(PORT), "--protected-mode", "no",
            "--save", "", "--appendonly", "no", "--dir", str(self.place.folder), "--maxclients", str(self.clients),
        ]  # fmt: skip

    def connection(self) -> Resp:
        return Resp(self.place.connect(PORT))

    def benchmark(self, requests: int, commands: str, *options: str) -> list[str]:
        return [
            where("redis-benchmark"), "-h", SERVER_IP, "-p", str(PORT), "-c", "50", "-n", str(requests),
            "-t", commands, "--csv", *options,
        ]  # fmt: skip

    def exercise(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        with self.connection() as redis:
            data = self._fill(redis)
            for title, options in (("", ()), (" -P 16", ("-P", "16"))):
                argv = self.benchmark(self.place.count(100_000, 2000), COMMANDS, *options)
                said = self.attempt(f"redis-benchmark{title}", self.place.client, argv)
                figures |= rates(said or "", title)
            figures["bgsave_s"] = self.attempt("BGSAVE under load", self._save, redis)
            self._compare(redis, data)
            clients = redis.info("stats")
            figures["connections"] = int(clients["total_connections_received"])
            self.expect(clients["rejected_connections"] == "0", "connections were rejected")
        self.expect(bool(figures), "redis-benchmark printed no figures")
        return figures

    def _fill(self, redis: Resp) -> dict[str, bytes]:
        rng = random.Random(7)
        data = {f"k{i}": rng.randbytes(rng.choice((0, 3, 100, 1400, 9000))) for i in range(2000)}
        data["large"] = rng.randbytes(5_000_000)
        for key, value in data.items():
            redis.send("SET", key, value)
        for _ in data:
            self.expect(redis.answer() == b"OK", "SET gave no OK")
        return data

    def _compare(self, redis: Resp, data: dict[str, bytes]) -> None:
        wrong = [key for key, value in data.items() if redis.call("GET", key) != value]
        self.expect(not wrong, f"{len(wrong)} values are not what was written, as {wrong[:3]}")
        count = redis.call("DBSIZE")
        said = self.attempt("the saved file", self.place.server, [where("redis-check-rdb"), "dump.rdb"])
        self.expect(f" {count} keys read" in (said or ""), f"the saved file has not the {count} keys: {said}")

    def _save(self, redis: Resp) -> float:
        """Two background saves, with a load that lasts longer."""
        requests = self.place.count(400_000, 20_000)
        load = self.place.background(self.benchmark(requests, "set,get", "-l", "-q"))
        try:
            began = time.monotonic()
            for _ in range(2):
                redis.call("BGSAVE")
                while redis.info("persistence")["rdb_bgsave_in_progress"] != "0":
                    if time.monotonic() - began > SAVE_S:
                        raise BenchError(f"not done after {SAVE_S:g} s")
                    time.sleep(0.02)
            took = time.monotonic() - began
            status = redis.info("persistence")["rdb_last_bgsave_status"]
            self.expect(status == "ok", f"BGSAVE: {status}: {self.server.said()}")
            self.expect(load.poll() is None, f"the load ended with exit code {load.returncode}")
        finally:
            load.terminate()
            load.communicate(timeout=20)
        redis.call("BGSAVE")  # once more, without load: this file is compared
        while redis.info("persistence")["rdb_bgsave_in_progress"] != "0":
            time.sleep(0.02)
        return round(took, 2)


def rates(said: str, title: str) -> dict[str, float]:
    """Requests per second by command, from redis-benchmark's CSV."""
    rows = csv.reader(line for line in said.splitlines() if line.startswith('"') and '"test"' not in line)
    return {f"{row[0].split(' ')[0].lower()}{title}": float(row[1]) for row in rows}


class RedisMany(Redis):
    """All connections that its descriptors allow, at once."""

    name = "redis-many"
    title = "redis-server, 19,000 connections held"
    needs: ClassVar[tuple[str, ...]] = ("redis-server",)
    rated: ClassVar[tuple[str, ...]] = ("opened_per_s",)
    unit = "opened/s"
    clients = 19_500
    files = 20_000
    stack: ClassVar[dict[str, int]] = {"conns": 24_000, "socks": 24_100}

    def exercise(self) -> dict[str, Any]:
        count = self.place.count(19_000, 500)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        argv = [
            "ip", "netns", "exec", self.place.lab.client_ns, "prlimit", f"--nofile={hard}:{hard}", "--",
            sys.executable, str(ROOT / "bench" / "apps" / "hold.py"), SERVER_IP, str(PORT), str(count),
        ]  # fmt: skip
        found: dict[str, Any] = self.attempt("connections", run_json, argv, 300) or {}
        self.problems += found.pop("problems", [])
        self.expect(found.get("held") == count, f"{found.get('held')} connections of {count} were held")
        if found.get("opened_s"):
            found["opened_per_s"] = round(found["held"] / found["opened_s"])
        with self.connection() as redis:
            seen = redis.info("stats")
            self.expect(
                int(seen["total_connections_received"]) >= count, "redis counted fewer connections than that"
            )
            self.expect(seen["rejected_connections"] == "0", "connections were rejected")
        return found
