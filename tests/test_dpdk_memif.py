# SPDX-License-Identifier: Apache-2.0
"""A memif port outlives its peer, whenever that goes: DPDK's driver takes the rings' memory away in a thread of its
own, while the port is polled.

`python tests/test_dpdk_memif.py SECONDS` cuts for longer, and says how often it has.
"""

from __future__ import annotations

import errno
import importlib
import os
import random
import select
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpdk_support import CLEAN, Node, backend, in_child, needs_dpdk, say, until
from memif_peer import Client, Gone, Server

from bypass.dpdk_backend import DpdkDevice

__all__ = ["needs_dpdk"]

ADDRESS, PEER = "192.0.2.1", "192.0.2.2"
MAC, PEER_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
SECONDS = 1.0


def port(role: str, path: str) -> str:
    return f"net_memif0,role={role},id=0,socket={path},mac=02:00:00:00:00:01,socket-abstract=no"


def question() -> bytes:
    """Who has the address under test? Each is answered."""
    arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + PEER_MAC + socket.inet_aton(PEER)
    frame = MAC + PEER_MAC + b"\x08\x06" + arp + bytes(6) + socket.inet_aton(ADDRESS)
    return frame.ljust(60, b"\0")


def told() -> bool:
    return bool(select.select([0], [], [], 0)[0])


def received(device: DpdkDevice) -> int:
    return sum(q["rx_packets"] for q in device.statistics().values())


def sent(device: DpdkDevice) -> int:
    return sum(q["tx_packets"] for q in device.statistics().values())


@in_child
def serves(device: str) -> dict[str, Any]:
    """Polls until it is told to end."""
    with DpdkDevice(None, backend(device)) as d:
        node = Node(d, ADDRESS)
        say("ready")
        until(told, node, seconds=3600)
        return {"rx": received(d), "tx": sent(d), "after": node.settled()}


@in_child
def comes_again_and_again(device: str) -> dict[str, Any]:
    """Opens, polls until the other side has come and gone, closes, and once more, until it is told to end."""
    times, rx, after = 0, 0, []
    say("ready")
    while not told():
        with DpdkDevice(None, backend(device)) as d:
            node = Node(d, ADDRESS)
            until(lambda d=d: (received(d) and d.health() == errno.ENETDOWN) or told(), node)
            rx += received(d)
            after.append(node.settled())
        times += 1
    return {"times": times, "rx": rx, "after": [a for a in after if a != CLEAN]}


def sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the folder itself
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found


@in_child
def opens_and_closes(device: str) -> dict[str, Any]:
    """Closes when a client talks, and opens anew, until it is told to end. Sockets of the process after each."""
    times, after, open_now = 0, [], []
    say("ready")
    while not told():
        with DpdkDevice(None, backend(device)) as d:
            node = Node(d, ADDRESS)
            until(lambda d=d: received(d) or told(), node)
            after.append(node.settled())
        times += 1
        open_now.append(sockets())
    return {"times": times, "after": [a for a in after if a != CLEAN], "open": [min(open_now), max(open_now)]}


def cut_clients(path: str, dice: random.Random, until_then: Callable[[], bool]) -> tuple[int, int]:
    """Clients that go at any step, or while they talk. How many, and how many of them have talked."""
    cuts = talked = 0
    while not (until_then() and cuts > talked > 0):
        try:
            peer = Client(path)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.001)  # the server is closed just now
            continue
        with peer:
            steps = len(Client.STEPS) if dice.random() < 0.6 else dice.randrange(len(Client.STEPS))
            try:
                for step in Client.STEPS[:steps]:
                    step(peer)
                if steps == len(Client.STEPS):
                    peer.talk([question()], dice.randrange(1, 300))
                    talked += 1
            except Gone:
                pass  # the one before is being taken down yet
        cuts += 1
    return cuts, talked


def last_client(path: str) -> int:
    """What is answered to one that stays."""
    end = time.monotonic() + 20
    while True:
        with Client(path) as peer:
            try:
                for step in Client.STEPS:
                    step(peer)
            except Gone:
                assert time.monotonic() < end
                continue
            while not (got := peer.talk([question()], 100)):
                assert time.monotonic() < end
            return got


def for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def test_a_server_outlives_clients_that_go_at_any_moment(tmp_path: Path) -> None:
    path = str(tmp_path / "memif")
    with serves.start(port("server", path)) as server:
        assert server.line() == "ready"
        cut_clients(path, random.Random(5), for_seconds(SECONDS))
        assert last_client(path) > 0
        server.tell("end")
        got = server.result()
    assert got["rx"] >= got["tx"] > 0
    assert got["after"] == CLEAN


def test_a_server_is_closed_and_opened_while_clients_come_and_go(tmp_path: Path) -> None:
    path = str(tmp_path / "memif")
    with opens_and_closes.start(port("server", path)) as server:
        assert server.line() == "ready"
        cut_clients(path, random.Random(7), for_seconds(SECONDS))
        server.tell("end")
        got = server.result()
    assert got["times"] > 0
    assert got["after"] == []
    assert got["open"][1] <= got["open"][0] + 3, "each leaves its listener, or who was not greeted"


def cut_servers(listener: socket.socket, dice: random.Random, until_then: Callable[[], bool]) -> int:
    """Serves a client under test, and goes while it talks. How often."""
    cuts = 0
    while not (until_then() and cuts):
        with Server(listener.accept()[0]) as peer:
            peer.serve()
            while not peer.talk(question(), dice.randrange(1, 20)):
                pass
        cuts += 1
    return cuts


def listen_at(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(16)
    return listener


def test_a_client_outlives_servers_that_go_while_they_talk(tmp_path: Path) -> None:
    path = str(tmp_path / "memif")
    with listen_at(path) as listener, comes_again_and_again.start(port("client", path)) as client:
        assert client.line() == "ready"
        cuts = cut_servers(listener, random.Random(6), for_seconds(SECONDS))
        client.tell("end")
        got = client.result()
    assert got["times"] >= cuts > 0
    assert got["rx"] > 0
    assert got["after"] == []


def main(seconds: float) -> None:
    """Both, for so long each."""
    module = importlib.import_module("test_dpdk_memif")  # by a name that a child can import
    with tempfile.TemporaryDirectory() as folder:
        with module.serves.start(port("server", f"{folder}/s")) as server:
            assert server.line() == "ready"
            cuts, talked = cut_clients(f"{folder}/s", random.Random(), for_seconds(seconds))
            print(f"{cuts} clients have gone, {talked} of them while they talked", flush=True)
            assert last_client(f"{folder}/s") > 0
            server.tell("end")
            print(server.result())
        path = f"{folder}/c"
        with listen_at(path) as listener, module.comes_again_and_again.start(port("client", path)) as client:
            assert client.line() == "ready"
            print(
                f"{cut_servers(listener, random.Random(), for_seconds(seconds))} servers have gone",
                flush=True,
            )
            client.tell("end")
            print(client.result())


if __name__ == "__main__":
    main(float(sys.argv[1]))
