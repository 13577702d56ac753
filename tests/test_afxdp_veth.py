# SPDX-License-Identifier: Apache-2.0
"""The AF_XDP device on a real kernel: every queue of a veth in copy mode, its modes, rings, checksums and
errors. The program that redirects follows no policy (afxdp_support)."""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from afxdp_fake import build
from afxdp_support import (
    PORT,
    Redirect,
    RedirectErrors,
    answer,
    attached,
    payload,
    receive,
    sum16,
    total,
    udp_clients,
    with_data,
    xdp_socket,
)

from bypass import netns
from bypass.afxdp import AfxdpDevice, interface_queues
from bypass.errors import DeviceError, PrivilegeError
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, SERVER_IP, Lab, wait_for
from bypass.raw import Frame, RawPort

pytestmark = pytest.mark.netns

SO_BUSY_POLL, SO_PREFER_BUSY_POLL = 46, 69
SOL_XDP, XDP_OPTIONS, XDP_MAX_TX_SKB_BUDGET = 283, 8, 9
XDP_SHARED_UMEM, XDP_COPY, XDP_USE_NEED_WAKEUP = 1, 2, 8


@pytest.fixture
def client(lab: Lab) -> Iterator[Callable[[], socket.socket]]:
    """Makes UDP sockets of the client, connected to the server."""
    with udp_clients(lab) as make:
        yield make


# ---- What it becomes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["auto", "copy", "skb"])
def test_the_mode_reported_is_the_mode_read_back(lab: Lab, mode: Any) -> None:
    with attached(lab, mode=mode, skb=mode == "skb") as (dev, _):
        assert dev.mode == "copy"
        for fd in dev.fds.values():
            with xdp_socket(fd) as s:
                flags = struct.unpack("=I", s.getsockopt(SOL_XDP, XDP_OPTIONS, 4))[0]
            assert flags & 1 == 0
        assert dev.mode_reason == (
            "the driver (veth) offers no zero-copy" if mode == "auto" else "as asked for"
        )
        assert dev.xdp_mode == ("skb" if mode == "skb" else "native")


def test_a_driver_that_offers_zerocopy_and_refuses_it_is_served_by_copies(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bind says nothing of it, the mode read back has to."""
    monkeypatch.setattr("bypass.doctor.choose_mode", lambda *_: ("zerocopy", "the driver offers it"))
    with netns.entered(lab.server_ns), AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=4096) as dev:
        assert dev.mode == "copy"
        assert dev.mode_reason == "the driver offers zero-copy and refused it: the kernel fell back to copies"


def test_zerocopy_on_a_veth_fails_with_the_reason(lab: Lab) -> None:
    with (
        netns.entered(lab.server_ns),
        pytest.raises(DeviceError, match="no zero-copy AF_XDP on this queue: use mode"),
    ):
        AfxdpDevice(SERVER_IFNAME, mode="zerocopy")


def test_fill_rings_are_populated_before_bind(lab: Lab, tmp_path: Path) -> None:
    """A driver may take frames at once. The sockets after the first inherit the mode and may not ask for one."""
    ffi, lib = build(tmp_path, "afxdp_order", "-Wl,--wrap=bind,--wrap=mmap")
    config = ffi.new(
        "struct afxdp_config *",
        {
            "ifname": SERVER_IFNAME.encode(),
            "mode": 1,
            "queue_count": 2,
            "queues": [0, 1],
            "frames": 1024,
            "frame_size": 2048,
            "ring_size": 128,
        },
    )
    size, fd, error = lib.afxdp_mem_size(config), ffi.new("int *"), ffi.new("struct afxdp_error *")
    mem = lib.afxdp_mem_map(size, fd)
    dev = netns.run(lab.server_ns, lib.afxdp_open, config, mem, size, error)
    assert dev != ffi.NULL, (error.err, error.step)
    try:
        assert lib.order_binds() == 2
        assert [lib.order_filled(i) for i in range(2)] == [128, 128]
        assert [lib.order_flags(i) for i in range(2)] == [XDP_COPY | XDP_USE_NEED_WAKEUP, XDP_SHARED_UMEM]
    finally:
        lib.afxdp_close(dev, 0)
        lib.afxdp_mem_unmap(mem, size, fd[0])


def test_address_mtu_and_queues_are_the_interfaces(lab: Lab) -> None:
    sides = lab.sides()
    assert sides is not None
    with attached(lab) as (dev, port):
        assert dev.mac == sides[0].mac == port.mac.hex(":")
        assert dev.mtu == port.mtu == 1500
        assert dev.queue_numbers == (0, 1)
        assert len(set(dev.fds.values())) == 2
        assert dev.queues_now() == 2


def test_all_six_kernel_statistics_are_exported(lab: Lab) -> None:
    kernel = [
        "rx_dropped",
        "rx_invalid_descs",
        "tx_invalid_descs",
        "rx_ring_full",
        "rx_fill_ring_empty_descs",
        "tx_ring_empty_descs",
    ]
    with attached(lab) as (dev, _):
        for queue in dev.statistics().values():
            assert [name for name in queue if name in kernel] == kernel


# ---- Packets --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lab", [{"queues": 1}, {"queues": 4}], indirect=True)
@pytest.mark.parametrize("skb", [False, True])
def test_flows_of_every_queue_arrive_and_are_answered(
    lab: Lab, client: Callable[[], socket.socket], skb: bool
) -> None:
    """Each with the verdict that the program wrote in front of it, in generic XDP too."""
    with attached(lab, verdict=(7, 3, 0x1234), skb=skb, mode="skb" if skb else "auto") as (dev, port):
        socks = [client() for _ in range(64)]
        for i, s in enumerate(socks):
            s.send(b"%d" % i * 20)
        got = receive(port, 64)
        assert sorted(payload(f) for f in got) == sorted(b"%d" % i * 20 for i in range(64))
        assert {(f.entry, f.rule, f.hash) for f in got} == {(7, 3, 0x1234)}
        by_queue = Counter(f.queue for f in got)
        # in generic XDP a veth takes the transmit queue for the receive queue's number plus one
        assert sorted(by_queue) == list(range(max(1, lab.queues - skb)))
        for f in got:
            assert port.send([answer(f.data)], queue=f.queue, timeout=5) == 1
        for i, s in enumerate(socks):
            assert s.recv(2000) == b"%d" % i * 20
        for queue, stats in dev.statistics().items():
            assert stats["rx_packets"] == stats["tx_packets"] == by_queue[queue]
        audit = dev.audit()
        assert audit.conserved
        assert audit.stack == audit.misplaced == audit.bad_free == 0


def test_some_queues_can_be_taken_alone(lab: Lab, client: Callable[[], socket.socket]) -> None:
    """The others' packets have no socket in the map, so the kernel gets them."""
    with netns.entered(lab.server_ns):
        kernel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        kernel.bind((SERVER_IP, PORT))
    with kernel, attached(lab, queues=[1]) as (dev, port):
        socks = [client() for _ in range(32)]
        for s in socks:
            s.send(b"x")
        mine: list[Frame] = []
        others: list[bytes] = []

        def all_came() -> bool:
            mine.extend(port.recv(timeout=0))
            while select.select([kernel], [], [], 0)[0]:
                others.append(kernel.recv(10))
            return len(mine) + len(others) == 32

        wait_for(all_came, 5, "32 packets")
        assert dev.queue_numbers == (1,)
        assert {f.queue for f in mine} == {0}  # an index into the queues that were opened
        assert mine
        assert others


def test_without_a_verdict_none_is_reported(lab: Lab, client: Callable[[], socket.socket]) -> None:
    with attached(lab) as (_, port):
        client().send(b"x")
        frame = receive(port, 1)[0]
        assert (frame.entry, frame.rule, frame.hash) == (None, None, 0)


def test_thousands_of_packets_lose_nothing_though_a_kick_takes_32(
    lab: Lab, client: Callable[[], socket.socket]
) -> None:
    s = client()
    with netns.entered(lab.client_ns):
        s.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
    with attached(lab) as (dev, port):
        for fd in dev.fds.values():
            with xdp_socket(fd) as x, suppress(OSError):  # kernels before 6.17 have no option to set back
                x.setsockopt(SOL_XDP, XDP_MAX_TX_SKB_BUDGET, 32)
        s.send(b"?")
        back = answer(receive(port, 1)[0].data)
        for start in range(0, 4000, 500):  # a veth's receiver without NAPI keeps 1000 packets
            numbers = range(start, start + 500)
            assert port.send([with_data(back, b"%d" % i) for i in numbers], timeout=20) == 500
            assert [int(s.recv(100)) for _ in numbers] == list(numbers)
        assert total(dev, "kick_again") > 0
        assert total(dev, "kick_busy") == 0
        assert total(dev, "tx_full") > 0  # backpressure was felt


def test_busy_polling_is_done_by_system_calls(lab: Lab, client: Callable[[], socket.socket]) -> None:
    with attached(lab, prefer_busy_poll=True, busy_poll_us=20, busy_poll_budget=64) as (dev, port):
        with xdp_socket(dev.fds[0]) as x:
            options = [x.getsockopt(socket.SOL_SOCKET, o) for o in (SO_PREFER_BUSY_POLL, SO_BUSY_POLL)]
        assert options == [1, 20]
        s = client()
        for i in range(20):
            s.send(b"%d" % i)
            frame = receive(port, 1)[0]
            assert port.send([answer(frame.data)], queue=frame.queue) == 1
            assert s.recv(100) == b"%d" % i
        assert total(dev, "kicks_rx") > 0


# ---- Rings ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lab", [{"queues": 1}], indirect=True)
def test_fill_starvation_is_counted_and_traffic_resumes(
    lab: Lab, client: Callable[[], socket.socket]
) -> None:
    from bypass._core import ffi

    with attached(lab, ring_size=64, frames=128, fill_target=64) as (dev, port):
        nd = dev.netdev
        pkts = ffi.new("bypass_pkt[]", 128)
        s = client()
        spare = nd.ops.alloc(nd, pkts, 128)
        assert spare == 64
        held, kept = [], ffi.new("bypass_pkt[]", 64)
        for i in range(80):
            s.send(b"%d" % i)
        for _ in range(64):  # keeps everything; veth delivers in its own time
            wait_for(lambda: nd.ops.rx_burst(nd, kept, 1) == 1, 5, "a packet")
            held.append(kept[0])
        assert nd.free_frames == 0
        wait_for(
            lambda: total(dev, "rx_fill_ring_empty_descs") == 16, 5, "the kernel to count 16 lost packets"
        )
        assert total(dev, "fill_starved") > 0
        nd.ops.free(nd, ffi.new("bypass_pkt[]", held), 64)
        s.send(b"again")
        assert payload(receive(port, 1)[0]) == b"again"
        nd.ops.free(nd, pkts, spare)
        audit = dev.audit()
        assert audit.conserved
        assert (audit.rx, audit.free) == (64, 64)


@pytest.mark.parametrize("lab", [{"queues": 1}], indirect=True)
def test_a_full_rx_ring_is_counted_and_traffic_resumes(lab: Lab, client: Callable[[], socket.socket]) -> None:
    with attached(lab, ring_size=32, fill_size=128, fill_target=128, frames=512) as (dev, port):
        s = client()
        for i in range(50):
            s.send(b"%d" % i)
        wait_for(lambda: total(dev, "rx_ring_full") == 18, 5, "the kernel to count 18 lost packets")
        assert [payload(f) for f in receive(port, 32)] == [b"%d" % i for i in range(32)]
        s.send(b"again")
        assert payload(receive(port, 1)[0]) == b"again"
        assert dev.audit().conserved


@pytest.mark.parametrize("lab", [{"queues": 1, "mtu": 3000}], indirect=True)
def test_packets_larger_than_a_frame_are_dropped_and_counted(
    lab: Lab, client: Callable[[], socket.socket]
) -> None:
    s = client()
    with attached(lab) as (dev, port):
        assert dev.mtu == 2048 - 256 - 14
        for size in (1750, 1751, 2500):
            s.send(b"x" * size)
        s.send(b"small")
        assert [len(payload(f)) for f in receive(port, 2)] == [1750, 5]
        assert total(dev, "rx_dropped") == 2
    with attached(lab, frame_size=4096) as (dev, port):
        assert dev.mtu == 3000
        s.send(b"x" * 2972)
        frame = receive(port, 1)[0]
        assert len(payload(frame)) == 2972
        assert port.send([answer(frame.data)]) == 1
        assert s.recv(4000) == b"x" * 2972


@pytest.mark.parametrize("crossed", [False, True])
def test_packets_for_the_socket_of_another_queue_show_in_the_tracepoint_alone(
    lab: Lab, client: Callable[[], socket.socket], crossed: bool
) -> None:
    """They are dropped and in no statistic of the socket. A device never puts a socket where it does not belong."""
    with netns.entered(lab.server_ns), AfxdpDevice(SERVER_IFNAME, ring_size=256, frames=4096) as dev:
        slots = {0: dev.fds[1], 1: dev.fds[0]} if crossed else dev.fds
        with Redirect(SERVER_IFNAME, slots) as redirect, RedirectErrors(redirect.map.fd) as errors:
            for i in range(20):
                client().send(b"%d" % i)
            if crossed:
                wait_for(lambda: errors.count() == 20, 5, "the tracepoint to count 20 packets")
            else:
                assert len(receive(RawPort(dev), 20)) == 20
                assert errors.count() == 0
        for queue in dev.statistics().values():
            assert crossed is (queue["rx_packets"] == 0)
            assert queue["rx_dropped"] == queue["rx_ring_full"] == queue["rx_fill_ring_empty_descs"] == 0


# ---- Checksums ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trust", [False, True])
def test_checksums_are_trusted_only_where_that_is_asked_for(
    lab: Lab, client: Callable[[], socket.socket], trust: bool
) -> None:
    """A veth peer with transmit checksum offload sends the pseudo-header's sum only."""
    from bypass._core import ffi, lib
    from pyroute2.ethtool.ioctl import IoctlEthtool

    with netns.entered(lab.client_ns):
        ethtool = IoctlEthtool(CLIENT_IFNAME)
        features = ethtool.get_features()
        features["tx-checksum-ip-generic"] = True
        ethtool.set_features(features)
        ethtool.close()
    with attached(lab, rx_csum_trust=trust) as (dev, _):
        client().send(b"partial checksum")
        nd, pkts = dev.netdev, ffi.new("bypass_pkt[]", 1)
        wait_for(lambda: nd.ops.rx_burst(nd, pkts, 1) == 1, 5, "a packet")
        m = ffi.cast("struct bypass_pkt_meta *", ffi.cast("char *", nd.meta) + pkts[0] * nd.meta_stride)
        frame = bytes(ffi.buffer(nd.mem + pkts[0] * nd.stride + m.off, m.len))
        assert not _udp_checksum_right(frame)
        assert bool(m.flags & lib.BYPASS_RX_CSUM_OK) is trust
        assert bool(nd.caps & lib.BYPASS_CAP_RX_CSUM) is trust
        nd.ops.free(nd, pkts, 1)


def _udp_checksum_right(frame: bytes) -> bool:
    udp = frame[34 : 14 + int.from_bytes(frame[16:18], "big")]
    return sum16(frame[26:34] + struct.pack(">HH", 17, len(udp)) + udp) == 0xFFFF


# ---- Errors ---------------------------------------------------------------------------------------------------------
def test_wrong_arguments_are_refused_clearly(lab: Lab) -> None:
    with netns.entered(lab.server_ns):
        for options, text in (
            ({"queues": [0, 2]}, "has no queue 2: it has queues 0 to 1"),
            ({"queues": []}, "at least one"),
            ({"queues": [0, 0]}, "each only once"),
            ({"ring_size": 100}, "powers of two"),
            ({"frame_size": 1024}, "2048 or 4096"),
            ({"mode": "fast"}, "mode 'fast': it is one of auto, copy, zerocopy, skb"),
        ):
            with pytest.raises(DeviceError, match=text):
                AfxdpDevice(SERVER_IFNAME, **options)  # type: ignore[arg-type]
        with pytest.raises(DeviceError, match=f"no interface 'nope'.*{SERVER_IFNAME}"):
            AfxdpDevice("nope")
        assert interface_queues(SERVER_IFNAME) == 2


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (["--bounding-set", "-net_raw"], "creating an AF_XDP socket failed: .*with CAP_NET_RAW"),
        (["--bounding-set", "-net_admin"], "setting SO_PREFER_BUSY_POLL failed: .*with CAP_NET_ADMIN"),
        (
            ["--bounding-set", "-ipc_lock,-sys_resource"],
            "8192 KiB have to be locked and the limit is 64 KiB: ulimit -l",
        ),
    ],
)
def test_missing_privilege_is_named(lab: Lab, limits: list[str], text: str) -> None:
    options = "ring_size=512, prefer_busy_poll=True" if "BUSY" in text else "ring_size=512"
    code = f"from bypass.afxdp import AfxdpDevice; AfxdpDevice('{SERVER_IFNAME}', {options})"
    command = ["prlimit", "--memlock=65536", "setpriv", *limits, sys.executable, "-c", code]
    with netns.entered(lab.server_ns):
        result = subprocess.run(command, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{PrivilegeError.__module__}.PrivilegeError:"), result.stderr
    assert re.search(text, last)


# ---- The bare echo --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spin", [False, True])
def test_the_bare_echo_answers_udp_and_tcp(lab: Lab, client: Callable[[], socket.socket], spin: bool) -> None:
    with attached(lab) as (dev, _):
        stop, out = threading.Event(), Counter[str]()

        def run() -> None:
            while not stop.is_set():
                out.update(dev.echo(0.02, port=PORT, spin=spin))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            s = client()
            for i in range(200):
                s.send(b"%d" % i * 16)
                assert s.recv(2000) == b"%d" % i * 16
            with netns.entered(lab.client_ns):
                t = socket.create_connection((SERVER_IP, PORT), timeout=5)
            with t:
                for i in range(200):
                    t.sendall(b"%064d" % i)
                    assert t.recv(2000) == b"%064d" % i
                t.shutdown(socket.SHUT_WR)
                assert t.recv(10) == b""
        finally:
            stop.set()
            thread.join()
        assert out["packets"] == 200 + 202  # SYN-ACK, data, FIN-ACK
        assert (out["polls"] == 0) is spin
        audit = dev.audit()
        assert audit.conserved
        assert (audit.tx, audit.stack) == (0, 0)
        s.send(b"to the device")
        with RawPort(dev) as port:  # goes on as a device afterwards
            assert payload(receive(port, 1)[0]) == b"to the device"


# ---- Raw ports ------------------------------------------------------------------------------------------------------
def test_a_raw_port_does_not_wait_when_told_so(lab: Lab) -> None:
    with attached(lab) as (dev, port):
        assert port.recv(timeout=0) == []
        assert port.recv(timeout=0.01) == []
        assert port.send([], timeout=0) == 0
        assert select.select([port], [], [], 0)[0] == []
        assert port.queues == 2
        port.close()
        port.close()
        with pytest.raises(DeviceError, match="closed"):
            port.recv(timeout=0)
        assert dev.audit().stack == 0


@pytest.mark.parametrize(("length", "err"), [(13, errno.EINVAL), (1519, errno.EMSGSIZE)])
def test_a_frame_of_wrong_length_is_refused_after_those_before_it(lab: Lab, length: int, err: int) -> None:
    with attached(lab) as (dev, port):
        with pytest.raises(OSError, match=os.strerror(err)) as caught:
            port.send([bytes(60), bytes(1518), bytes(length), bytes(60)])
        assert caught.value.errno == err
        assert total(dev, "tx_packets") == 2
        assert dev.audit().stack == 0
