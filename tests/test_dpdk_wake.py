# SPDX-License-Identifier: Apache-2.0
"""What wakes a program that sleeps on a DPDK port: interrupts, the driver's sockets, or a timer where there is nothing
else. Looks are counted, not time measured: a second of sleep is 500 times
2 ms (10,000 times 100 us), and 10 looks at the link.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from afxdp_support import link
from bypass._core import ffi, lib
from conftest import lab_name
from dpdk_support import backend, hear, in_child, needs_dpdk, say
from support import WAIT_S

from bypass import netns
from bypass.dpdk_backend import DpdkDevice
from bypass.errors import BypassError
from bypass.lab import WIRE_IFNAME, Lab
from bypass.raw import RawPort

__all__ = ["needs_dpdk"]

FRAME = b"\xff" * 6 + b"\x02" * 6 + b"\x88\xb5" + bytes(range(60))
IDLE_S = 1.0
QUIET = 50  # looks in that time, at most: the link's, and some that other things cause
NUMBERS = 20  # of frames in a conversation


@pytest.fixture
def wire() -> Iterator[Lab]:
    with Lab(lab_name(), wire=True, queues=1) as lab:
        yield lab


def total(device: DpdkDevice, name: str) -> int:
    return sum(q[name] for q in device.statistics().values())


def looks_in_vain(device: DpdkDevice, port: RawPort, seconds: float = IDLE_S) -> int:
    """While nothing comes."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline and port.recv(64, 0.2):
        pass  # what the kernel says when a link comes up
    before = total(device, "rx_idle")
    port.recv(1, seconds)
    return total(device, "rx_idle") - before


def frames(port: RawPort, count: int) -> list[bytes]:
    """Of ours, that many; sleeps for each."""
    got: list[bytes] = []
    while len(got) < count:
        (one,) = port.recv(1, WAIT_S) or [None]
        assert one is not None, f"{len(got)} of {count} frames came"
        if one.data[12:14] == b"\x88\xb5":
            got.append(one.data)
    return got


def numbered(i: int) -> bytes:
    return FRAME + bytes([i])


def converse(device: DpdkDevice, port: RawPort, other: RawPort) -> dict[str, Any]:
    """Sleeps for a few frames, in vain, and for each of some frames, which come apart."""

    def talk(count: int) -> list[bytes]:
        def send() -> None:
            for i in range(count):
                time.sleep(0.02)
                other.send([numbered(i)])

        sender = threading.Thread(target=send)
        sender.start()
        got = frames(port, count)
        sender.join()
        return got

    talk(3)  # interrupts are trusted when one has come
    looks = looks_in_vain(device, port)
    before = {name: total(device, name) for name in ("rx_interrupts", "rx_late")}
    got = talk(NUMBERS)
    return {
        "looks": looks,
        "order": [g[-1] for g in got] == list(range(NUMBERS)),
        "wake": device.about().wake,
        **{name: total(device, name) - n for name, n in before.items()},
    }


# ---- Interrupts ----------------------------------------------------------------------------------------------------
@in_child
def over_vhost(path: str, waits: str, **options: Any) -> dict[str, Any]:
    """Both ends in one process. waits: which of them sleeps."""
    with ExitStack() as stack:
        server = stack.enter_context(DpdkDevice(None, backend(f"net_vhost0,iface={path}", **options)))
        client = stack.enter_context(DpdkDevice(None, backend(f"net_virtio_user0,path={path}", **options)))
        ports = {"vhost": (server, RawPort(server)), "virtio": (client, RawPort(client))}
        device, port = ports.pop(waits)
        ((_, other),) = ports.values()
        end = time.monotonic() + WAIT_S
        while server.health() or client.health():
            assert time.monotonic() < end, "the two ends do not find each other"
        return converse(device, port, other)


@pytest.mark.parametrize("waits", ["vhost", "virtio"])
def test_the_interrupts_of_vhost_and_virtio_wake(tmp_path: Path, waits: str) -> None:
    got = over_vhost(str(tmp_path / "vhost.sock"), waits)
    assert got["order"]
    assert got["wake"] == "interrupts"
    assert got["looks"] < QUIET
    assert got["rx_interrupts"] >= NUMBERS // 2  # on a slow machine two frames may come while nobody sleeps
    assert got["rx_late"] <= 2


@in_child
def by_timer(path: str) -> dict[str, Any]:
    return over_vhost.function(path, "virtio", rx_interrupts="none")  # type: ignore[no-any-return]


def test_without_interrupts_a_timer_wakes(tmp_path: Path) -> None:
    got = by_timer(str(tmp_path / "vhost.sock"))
    assert got["order"]
    assert got["wake"] == "a timer: rx_interrupts: none"
    assert got["looks"] > QUIET
    assert got["rx_interrupts"] == 0


@in_child
def broken(path: str) -> dict[str, Any]:
    """The port's interrupt is another descriptor than the one that the other side signals: none comes any more."""
    with ExitStack() as stack:
        server = stack.enter_context(DpdkDevice(None, backend(f"net_vhost0,iface={path}")))
        client = stack.enter_context(DpdkDevice(None, backend(f"net_virtio_user0,path={path}")))
        port, other = RawPort(client), RawPort(server)
        end = time.monotonic() + WAIT_S
        while server.health() or client.health():
            assert time.monotonic() < end, "the two ends do not find each other"
        first = converse(client, port, other)
        wait_fd = client.netdev.ops.wait_fd(client.netdev)
        watched = Path(f"/proc/self/fdinfo/{wait_fd}").read_text().split("tfd:")[1:]
        (fd,) = (int(w.split()[0]) for w in watched if int(w.split("data:")[1].split()[0], 16) == 0)
        with select.epoll.fromfd(os.dup(wait_fd)) as watching:
            watching.unregister(
                fd
            )  # the other side has a descriptor of the same one, and closing ours does not end it
        fresh = os.eventfd(0, os.EFD_NONBLOCK)
        os.dup2(fresh, fd)
        os.close(fresh)
        second = converse(client, port, other)
        third = converse(client, port, other)
        return {"first": first, "second": second, "third": third}


def test_interrupts_that_do_not_come_are_missed_and_a_timer_takes_over(tmp_path: Path) -> None:
    got = broken(str(tmp_path / "vhost.sock"))
    assert got["first"]["wake"] == "interrupts"
    assert [got[name]["order"] for name in ("first", "second", "third")] == [True] * 3
    assert got["second"]["rx_interrupts"] == 0
    assert got["second"]["rx_late"] > 0
    assert got["third"]["wake"] == "a timer: the driver's interrupts do not come"
    assert got["third"]["looks"] > QUIET


# ---- Sockets -------------------------------------------------------------------------------------------------------
@in_child
def on_the_wire(device: str) -> dict[str, Any]:
    """Tells its parent when it sleeps for frames, which that sends."""
    with DpdkDevice(None, backend(device)) as one:
        port = RawPort(one)
        looks = looks_in_vain(one, port)
        say("sleeps")
        before = total(one, "rx_interrupts")
        got = frames(port, NUMBERS)
        interrupts = total(one, "rx_interrupts") - before
        say("got them")
        hear()
        # The interface is down: its socket has an error, which must not wake for ever.
        down = looks_in_vain(one, port)
        return {
            "looks": looks,
            "down": down,
            "rx_interrupts": interrupts,
            "order": [g[-1] for g in got] == list(range(NUMBERS)),
            "wake": one.about().wake,
            "late": total(one, "rx_late"),
        }


def send_from(namespace: str, ifname: str) -> None:
    import socket

    with netns.run(namespace, socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((ifname, 0))
        for i in range(NUMBERS):
            time.sleep(0.02)
            sock.send(numbered(i))


@pytest.mark.netns
def test_what_arrives_on_an_interface_wakes(wire: Lab) -> None:
    with on_the_wire.start(f"net_af_packet0,iface={WIRE_IFNAME}", netns=wire.server_ns) as child:
        assert child.line() == "sleeps"
        send_from(wire.client_ns, "bypass1")
        assert child.line() == "got them"
        link(wire.server_ns, WIRE_IFNAME, state="down")
        child.tell("look now")
        got = child.result()
    assert got["wake"] == "the driver's sockets"
    assert got["order"]
    assert got["looks"] < QUIET
    assert got["down"] < QUIET
    assert got["rx_interrupts"] >= NUMBERS // 2
    assert got["late"] == 0


# ---- The call ------------------------------------------------------------------------------------------------------
@in_child
def told_and_not_told(path: str) -> dict[str, Any]:
    with ExitStack() as stack:
        server = stack.enter_context(DpdkDevice(None, backend(f"net_vhost0,iface={path}")))
        client = stack.enter_context(DpdkDevice(None, backend(f"net_virtio_user0,path={path}")))
        nd, other = client.netdev, RawPort(server)
        out = ffi.new("bypass_pkt[]", 64)
        end = time.monotonic() + WAIT_S
        while server.health() or client.health():
            assert time.monotonic() < end, "the two ends do not find each other"

        def look() -> int:
            n = int(nd.ops.rx_burst(nd, out, 64))
            nd.ops.free(nd, out, n)
            return n

        while look():
            pass
        # Nobody has said that he sleeps: the timer wakes him.
        timer = select.select([nd.ops.wait_fd(nd)], [], [], WAIT_S)[0] != []
        look()
        # A frame that came after the last look, before interrupts were switched on.
        other.send([FRAME])
        waiting = int(nd.ops.sleep(nd))
        audit = client.audit()
        return {
            "timer": timer,
            "waiting": waiting,
            "held": audit.stack,
            "clean": audit.conserved,
            "got": look(),
        }


def test_a_frame_that_came_before_the_interrupt_was_on_is_not_slept_over(tmp_path: Path) -> None:
    got = told_and_not_told(str(tmp_path / "vhost.sock"))
    assert got == {"timer": True, "waiting": 1, "held": 1, "clean": True, "got": 1}


# ---- What is asked for ----------------------------------------------------------------------------------------------
@in_child
def wakes_of(devices: list[str]) -> list[str]:
    found = []
    for device in devices:
        for choice in ("auto", "required"):
            try:
                with DpdkDevice(None, backend(device, rx_interrupts=choice)) as one:
                    found.append(one.about().wake)
            except BypassError as error:
                found.append(str(error))
    return found


def test_a_driver_without_interrupts_says_so_or_is_refused(tmp_path: Path) -> None:
    ring = wakes_of(["net_ring0", f"net_memif0,role=server,socket={tmp_path}/m.sock,socket-abstract=no"])
    refusal = "rx_interrupts: required, but the driver has no interrupts (driver {}): auto sleeps by a timer"
    assert ring[0] == ring[2] == "a timer: the driver has no interrupts"
    assert refusal.format("net_ring") in ring[1]
    assert refusal.format("net_memif") in ring[3]


def test_the_bits_of_the_policy_are_the_plug_ins() -> None:
    from bypass.dpdk_backend.eal import port_config

    flags = {
        c: port_config(backend("net_null0", rx_interrupts=c))["flags"] for c in ("auto", "required", "none")
    }
    assert flags == {"auto": 0, "required": lib.DPDK_F_RX_INTERRUPTS, "none": lib.DPDK_F_NO_RX_INTERRUPTS}
