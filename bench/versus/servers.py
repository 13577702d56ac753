# SPDX-License-Identifier: Apache-2.0
"""The programs that are compared, and what each is asked: one request, with an answer of constant length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bench.apps import memcached, nginx, redis
from bench.apps.app import ServerApp
from bench.apps.launch import Grant
from bench.programs import program
from bypass.lab import SERVER_IP

__all__ = ["BLOCKING", "MEMCACHED", "NGINX", "REDIS", "RR", "RR_PORT", "WORKLOADS", "Workload", "threaded"]

RR_PORT = 7000
VALUE = "x" * 32


class _Asked(ServerApp):
    """Asked by bench/load.c and not by exercise()."""

    def exercise(self) -> dict[str, Any]:
        return {}


class RoundTrip(_Asked):
    """bench/rr.c: sends back what it reads."""

    name = "rr"
    title = "echo"
    needs = ()
    grants = (Grant(RR_PORT),)
    threads: ClassVar[int] = 1

    def argv(self) -> list[str]:
        return [program("rr"), SERVER_IP, str(RR_PORT), str(self.threads)]


class BlockingRoundTrip(RoundTrip):
    """With calls that block, as netperf's TCP_RR."""

    threads = 0


class OneWorker(nginx.Nginx):
    needs = ("nginx",)
    worker_processes = 1


class OneThread(memcached.Memcached):
    threads = 1


@dataclass(frozen=True)
class Workload:
    """`before` is sent once when the server has started; `request` is what is measured."""

    name: str
    title: str
    server: type[ServerApp]
    port: int
    parallel: int
    request: str
    before: str = ""


_GET = "GET /500.bin HTTP/1.1\r\nHost: test\r\n\r\n"
REDIS, MEMCACHED, NGINX, RR, BLOCKING = redis.Redis, OneThread, OneWorker, RoundTrip, BlockingRoundTrip
WORKLOADS = (
    Workload(
        "redis_get", "redis GET, 50 connections", REDIS, redis.PORT, 50,
        "*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n", "*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$3\r\nxxx\r\n",
    ),
    Workload(
        "redis_set", "redis SET, 50 connections", REDIS, redis.PORT, 50,
        "*3\r\n$3\r\nSET\r\n$3\r\nkey\r\n$3\r\nxxx\r\n",
    ),
    Workload(
        "memcached_get", "memcached get, 32 bytes, 50 connections", MEMCACHED, memcached.PORT, 50,
        "get key\r\n", f"set key 0 0 {len(VALUE)}\r\n{VALUE}\r\n",
    ),
    Workload("nginx_small", "nginx, 500 bytes, 50 kept connections", NGINX, nginx.PORT, 50, _GET),
    Workload("rr_1", "1 byte there and back, 1 connection, blocking", BLOCKING, RR_PORT, 1, "x"),
    Workload("rr_50", "1 byte there and back, 50 connections", RR, RR_PORT, 50, "x"),
)  # fmt: skip


def threaded(server: type[ServerApp], threads: int) -> type[ServerApp]:
    """The same program with so many threads or workers."""
    setting = {NGINX: "worker_processes", MEMCACHED: "threads", RR: "threads"}[server]
    return type(f"{server.__name__}{threads}", (server,), {setting: threads})
