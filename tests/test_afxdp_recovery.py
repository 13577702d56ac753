# SPDX-License-Identifier: Apache-2.0
"""The AF_XDP device when the world below it changes: links that flap, interfaces that go, queues that come, queues
that others have, processes that are killed."""

from __future__ import annotations

import errno
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from afxdp_support import (
    PORT,
    Redirect,
    answer,
    attached,
    link,
    payload,
    receive,
    set_queues,
    total,
    udp_clients,
    with_data,
)

from bypass import libbpf, netns
from bypass.afxdp import AfxdpDevice
from bypass.errors import DeviceError
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, SERVER_IP, Lab, wait_for
from bypass.raw import RawPort

pytestmark = pytest.mark.netns

TESTS = Path(__file__).parent


@pytest.fixture
def client(lab: Lab) -> Iterator[Callable[[], socket.socket]]:
    """Makes UDP sockets of the client, connected to the server."""
    with udp_clients(lab) as make:
        yield make


# ---- Links and devices ----------------------------------------------------------------------------------------------
def test_a_link_flap_recovers_unattended(lab: Lab, client: Callable[[], socket.socket]) -> None:
    s = client()
    with attached(lab) as (dev, port):
        s.send(b"before")
        back = answer(receive(port, 1)[0].data)
        link(lab.server_ns, SERVER_IFNAME, state="down")
        assert dev.health() == errno.ENETDOWN
        assert port.send([back], timeout=0) == 1  # the ring keeps it
        assert total(dev, "kick_down") > 0
        link(lab.server_ns, SERVER_IFNAME, state="up")
        wait_for(lambda: dev.health() == 0, 5, "the link to be usable")
        port.send([with_data(back, b"after")])
        assert {s.recv(100), s.recv(100)} == {b"before", b"after"}  # also the one that waited
        s.send(b"and on")
        assert payload(receive(port, 1)[0]) == b"and on"
        assert dev.audit().conserved


def test_packets_the_kernel_drops_are_counted_and_never_sent_again(
    lab: Lab, client: Callable[[], socket.socket]
) -> None:
    """No carrier: each is taken, dropped and completed, and the call says EBUSY."""
    s = client()
    with attached(lab) as (dev, port):
        s.send(b"x")
        back = answer(receive(port, 1)[0].data)
        link(lab.client_ns, CLIENT_IFNAME, state="down")
        assert port.send([back] * 5, timeout=5) == 5
        assert total(dev, "kick_busy") == 5
        link(lab.client_ns, CLIENT_IFNAME, state="up")
        port.send([with_data(back, b"y")], timeout=5)
        assert s.recv(100) == b"y"
        s.settimeout(0)
        with pytest.raises(BlockingIOError):
            s.recv(100)
        assert port.recv(timeout=0) == []
        assert dev.audit().tx == 0


def test_deletion_of_the_interface_is_reported_though_poll_stays_silent(
    lab: Lab, client: Callable[[], socket.socket]
) -> None:
    from pyroute2 import IPRoute

    with netns.entered(lab.server_ns):
        dev = AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=4096)
    with dev, RawPort(dev) as port:
        link(lab.server_ns, SERVER_IFNAME, state="down")
        assert port.send([bytes(60)] * 5, timeout=0) == 5
        assert dev.audit().tx == 5
        with IPRoute(netns=lab.server_ns) as ip:
            ip.link("del", index=ip.link_lookup(ifname=SERVER_IFNAME)[0])
        assert select.select([port.fileno()], [], [], 0)[0] == []
        wait_for(lambda: dev.health() == errno.ENXIO, 5, "the device to be gone")
        for action in (lambda: port.recv(timeout=1), lambda: port.send([bytes(60)], timeout=1)):
            with pytest.raises(DeviceError, match="gone"):
                action()
        audit = dev.audit()
        assert audit.conserved
        assert audit.tx == 0
        assert total(dev, "tx_abandoned") == 5


def test_closing_is_bounded_when_completions_never_come(lab: Lab) -> None:
    with netns.entered(lab.server_ns):
        dev = AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=4096)
    link(lab.server_ns, SERVER_IFNAME, state="down")
    assert RawPort(dev).send([bytes(60)] * 7, timeout=0) == 7
    assert dev.close(wait_s=0.05) == 7
    assert dev.close() == 0
    with pytest.raises(DeviceError, match="closed"):
        dev.audit()


@pytest.mark.parametrize("lab", [{"queues": 4}], indirect=True)
def test_queues_that_appear_later_are_taken(lab: Lab, client: Callable[[], socket.socket]) -> None:
    set_queues(lab, 1)
    with netns.entered(lab.server_ns):
        dev = AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=512)
    with dev, RawPort(dev) as port:
        assert dev.take_new_queues() == {}
        assert dev.audit().rx == 256
        set_queues(lab, 4)
        new = dev.take_new_queues()
        assert sorted(new) == [1, 2, 3]
        assert dev.queue_numbers == (0, 1, 2, 3)
        assert port.queues == 4
        audit = dev.audit()
        assert audit.conserved
        assert audit.rx == 256 + 3 * 64  # each now keeps its share; the first comes down to it in use
        with netns.entered(lab.server_ns), Redirect(SERVER_IFNAME, dev.fds):
            for _ in range(8):
                socks = [client() for _ in range(64)]
                for i, s in enumerate(socks):
                    s.send(b"%d" % i)
                got = receive(port, 64)
                assert sorted(payload(f) for f in got) == sorted(b"%d" % i for i in range(64))
                assert {f.queue for f in got} == {0, 1, 2, 3}
        audit = dev.audit()
        assert audit.conserved
        assert audit.rx < 256 + 3 * 64


@pytest.mark.parametrize("lab", [{"queues": 4}], indirect=True)
def test_a_queue_that_cannot_be_taken_leaves_the_device_as_it_was(lab: Lab) -> None:
    set_queues(lab, 1)
    with attached(lab, ring_size=256, frames=512, bind_wait_s=0.02) as (dev, _):
        set_queues(lab, 3)
        with netns.entered(lab.server_ns), AfxdpDevice(SERVER_IFNAME, queues=[2], ring_size=256, frames=1024):
            with pytest.raises(DeviceError, match=r"queue 2: binding failed: .* this process"):
                dev.take_new_queues()
            audit = dev.audit()
            assert dev.queue_numbers == (0, 1)
            assert audit.conserved
            assert audit.rx == 256 + 85
        wait_for(lambda: _taken(dev) == (0, 1, 2), 5, "the queue to be free again")


def _taken(dev: AfxdpDevice) -> tuple[int, ...]:
    with suppress(DeviceError):
        dev.take_new_queues()
    return dev.queue_numbers


@pytest.mark.parametrize("lab", [{"queues": 2}], indirect=True)
def test_too_few_frames_for_one_more_queue_are_reported(lab: Lab) -> None:
    set_queues(lab, 1)
    with attached(lab, ring_size=32, frames=64, fill_target=32) as (dev, _):
        set_queues(lab, 2)
        with pytest.raises(DeviceError, match="queue 1, for which 64 frames are too few"):
            dev.take_new_queues()
        assert dev.audit().conserved


# ---- Queues in use --------------------------------------------------------------------------------------------------
HOLD = f"""
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from afxdp_fake import build
from afxdp_support import Redirect
from bypass.afxdp import AfxdpDevice
dev = AfxdpDevice("{SERVER_IFNAME}", ring_size=256, frames=4096)
redirect = Redirect("{SERVER_IFNAME}", dev.fds)
print("open", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(lab: Lab) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the server's queues."""
    with netns.entered(lab.server_ns):
        p = subprocess.Popen(
            [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    try:
        assert p.stdout is not None
        assert p.stdout.readline() == "open\n"
        yield p
    finally:
        p.kill()
        p.communicate()


def test_a_busy_queue_says_who_has_it(lab: Lab) -> None:
    with holder(lab) as p, netns.entered(lab.server_ns), pytest.raises(DeviceError) as caught:
        AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=4096, bind_wait_s=0.05)
    assert re.search(rf"queue 0: binding failed: .* busy.*\({p.pid}\)", str(caught.value))


def test_a_busy_queue_is_waited_for(lab: Lab) -> None:
    """The kernel closes AF_XDP sockets asynchronously: whoever comes next has to wait."""
    with netns.entered(lab.server_ns):
        for _ in range(4):
            with AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=4096, bind_wait_s=30):
                pass
        dev = AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=4096, bind_wait_s=30)
        timer = threading.Timer(0.1, dev.close)
        timer.start()
        with AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=4096, bind_wait_s=30) as after:
            assert after.mode == "copy"
        timer.join()


def test_nothing_is_left_of_a_killed_process(lab: Lab, client: Callable[[], socket.socket]) -> None:
    with netns.entered(lab.server_ns):
        kernel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        kernel.bind((SERVER_IP, PORT))
        kernel.setblocking(False)
        ifindex = socket.if_nametoindex(SERVER_IFNAME)
    s = client()
    with kernel, holder(lab) as p:
        s.send(b"taken")
        p.send_signal(signal.SIGKILL)
        p.wait()

        def kernel_gets_it() -> bool:
            s.send(b"kernel's")
            return bool(select.select([kernel], [], [], 0.01)[0]) and kernel.recv(100) == b"kernel's"

        wait_for(kernel_gets_it, 5, "the kernel to receive what the dead process did")
        with netns.entered(lab.server_ns):
            assert libbpf.xdp_attached(ifindex) is None
            with AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=4096) as dev:
                assert dev.audit().conserved
