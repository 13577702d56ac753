# SPDX-License-Identifier: Apache-2.0
"""What a device does for the stack: checksums, large segments (TSO) and packets in several pieces. net_tap does all of
it in software and hands the result to the kernel, which judges it."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import time
from ctypes import CDLL
from pathlib import Path
from typing import Any

import pytest
from bypass._core import ffi, lib
from c_programs import run
from dpdk_support import (
    CLEAN,
    Node,
    backend,
    finish,
    hear,
    in_child,
    needs_dpdk,
    places,
    say,
    serve_echo,
    until,
)
from sim_ports import burst, meta_of, tcp_frame

from bypass import netns
from bypass.dpdk_backend import DpdkDevice
from bypass.raw import RawPort

__all__ = ["needs_dpdk"]

PORT = 7
TAP = "dtap0"


def ip(namespace: str, *command: str) -> None:
    netns.run(namespace, subprocess.run, ["ip", *command], check=True)


def counts(ns: str) -> dict[str, int]:
    """The kernel's counters of TCP in a namespace."""
    table = netns.run(ns, Path("/proc/thread-self/net/snmp").read_text).splitlines()
    names, values = (line.split()[1:] for line in table if line.startswith("Tcp:"))
    return dict(zip(names, map(int, values), strict=True))


@in_child
def served_on_tap(size: int, options: dict[str, Any]) -> dict[str, Any]:
    with DpdkDevice(None, backend(f"net_tap0,iface={TAP}", **options)) as device:
        say("ready")
        hear()
        node = Node(device, "192.0.2.1")
        sock = node.listen(PORT)
        say("listening")
        serve_echo(node, sock, size)
        ours, about = device.statistics()[0], device.about()
        return {
            "used": [*about.rx_used, *about.tx_used],
            "tso": [ours["tso_packets"], ours["tso_segments"]],
            "tx_packets": ours["tx_packets"],
            "invalid": ours["tx_invalid"],
            "retransmits": node.core.stats()["tcp_out_retransmits"],
            "csum_bad": ours["rx_csum_bad"],
            "after": node.settled(),
        }


def echo_through_tap(
    namespace: str, size: int, kernel_mtu: int = 1500, **options: Any
) -> tuple[bool, dict[str, Any], int]:
    """Whether the bytes are equal, what the port says, and wrong segments that the kernel received."""
    data = hashlib.shake_128(b"tap").digest(4096) * (size // 4096)
    with served_on_tap.start(size, options, netns=namespace) as server:
        assert server.line() == "ready"
        ip(namespace, "link", "set", TAP, "up", "mtu", str(kernel_mtu))
        ip(namespace, "addr", "add", "192.0.2.2/24", "dev", TAP)
        server.tell("go")
        assert server.line() == "listening"
        before = counts(namespace)["InErrs"]
        with netns.run(namespace, socket.socket, socket.AF_INET, socket.SOCK_STREAM) as s:
            s.settimeout(30)
            s.connect(("192.0.2.1", PORT))
            got, chunk = b"", 128 * 1024
            for at in range(0, size, chunk):
                s.sendall(data[at : at + chunk])
                while len(got) < at + chunk:
                    got += s.recv(1 << 20)
            s.shutdown(socket.SHUT_WR)
            result = server.result()
            return got == data, result, counts(namespace)["InErrs"] - before


@pytest.mark.netns
def test_large_segments_arrive_as_the_same_bytes_with_right_checksums(namespace: str) -> None:
    """The kernel's MTU is smaller: net_tap refuses segments that fill the port's (see the next test)."""
    same, got, wrong = echo_through_tap(namespace, 2 << 20, 1400)
    assert (same, wrong, got["invalid"]) == (True, 0, 0)
    assert {"TCP_TSO", "MULTI_SEGS", "TCP_CKSUM", "UDP_CKSUM"} <= set(got["used"])
    packets, segments = got["tso"]
    assert segments > 2 * packets > 0
    assert got["after"] == CLEAN


@pytest.mark.netns
def test_a_driver_that_refuses_large_segments_gets_small_ones(namespace: str) -> None:
    same, got, wrong = echo_through_tap(namespace, 1 << 20)
    assert (same, wrong, got["tso"]) == (True, 0, [0, 0])
    assert "TCP_TSO" in got["used"]
    assert got["after"] == CLEAN


@pytest.mark.netns
def test_without_offloads_the_stack_does_it_all(namespace: str) -> None:
    same, got, wrong = echo_through_tap(namespace, 1 << 20, offloads="none")
    assert (same, wrong, got["used"], got["tso"]) == (True, 0, [], [0, 0])
    assert got["after"] == CLEAN


# ---- A port of a vhost-user switch ---------------------------------------------------------------------------------
WRONG = ("ip_in_bad_header", "ip_in_bad_checksum", "ip_in_truncated", "tcp_in_bad_checksum")


def nothing_vouched_for(netdev: Any) -> Any:
    """The stack on it checks each checksum itself, whatever the driver says of it. What has to stay alive."""
    real = netdev.ops.rx_burst

    @ffi.callback("int(struct bypass_netdev *, bypass_pkt *, int)")
    def rx_burst(dev: Any, out: Any, most: int) -> int:
        got = int(real(dev, out, most))
        for i in range(got):
            meta_of(dev, out[i]).flags = 0
        return got

    ops = ffi.new("struct bypass_netdev_ops *", netdev.ops[0])
    ops.rx_burst = rx_burst
    netdev.ops = ops
    return ops, rx_burst


@in_child
def behind_vhost(path: str, size: int, large: int) -> dict[str, Any]:
    """Takes bytes of a virtio port whose large segments nobody cuts up. The driver completes the TCP checksums that it
    finds left out, which are right when their beginning was."""
    device = backend(f"net_vhost0,iface={path},tso={large}", frame_size=16384, offloads="none")
    with DpdkDevice(None, device) as device:
        kept = nothing_vouched_for(device.netdev)
        node = Node(device, "192.0.2.1", rcvbuf=14_000)  # so that what is in flight fits a frame
        sock = node.listen(PORT)
        say("ready")
        conn = until(lambda: max(node.core.accept(sock), 0), node)
        got = b""

        def more() -> bool:
            nonlocal got
            piece = node.core.recv(conn, 1 << 16)
            if isinstance(piece, bytes):
                got += piece
            else:
                time.sleep(0.0001)
            return len(got) >= size

        until(more, node)
        ours, stats = device.statistics()[0], node.core.stats()
        finish(node, conn)
        assert kept
        return {
            "hash": hashlib.sha256(got).hexdigest(),
            "rx_packets": ours["rx_packets"],
            "wrong": [ours["rx_bad"], ours["rx_csum_bad"], *(stats[name] for name in WRONG)],
            "after": node.settled(),
        }


@in_child
def on_virtio(path: str, size: int) -> dict[str, Any]:
    with DpdkDevice(None, backend(f"net_virtio_user0,path={path}")) as device:
        node = Node(device, "192.0.2.2")
        core, data = node.core, hashlib.shake_128(b"virtio").digest(size)
        sock = core.socket(lib.BYPASS_STREAM)
        core.connect(sock, ("192.0.2.1", PORT))
        sent = 0

        def step() -> bool:
            nonlocal sent
            if (n := core.send(sock, data[sent : sent + 65536])) > 0:
                sent += n
            else:
                time.sleep(0.0001)
            return sent == size

        until(step, node)
        finish(node, sock)
        ours, about = device.statistics()[0], device.about()
        return {
            "hash": hashlib.sha256(data).hexdigest(),
            "used": about.tx_used,
            "tso": [ours["tso_packets"], ours["tso_segments"]],
            "after": node.settled(),
        }


@pytest.mark.parametrize("large", [1, 0])
def test_virtio_gets_large_segments_where_its_host_takes_them(tmp_path: Path, large: int) -> None:
    path, size = str(tmp_path / "vhost.sock"), 1 << 17
    with behind_vhost.start(path, size, large) as taker:
        assert taker.line() == "ready"
        sender = on_virtio(path, size)
        got = taker.result()
    packets, segments = sender["tso"]
    assert got["hash"] == sender["hash"]
    assert set(got["wrong"]) == {0}
    assert {"TCP_CKSUM", "UDP_CKSUM"} <= set(sender["used"])
    assert ("TCP_TSO" in sender["used"]) == bool(large)
    if large:
        assert segments > 2 * packets > 0
        assert got["rx_packets"] < size // 1448, "what is large arrives large"
    else:
        assert (packets, segments) == (0, 0)
    assert (got["after"], sender["after"]) == (CLEAN, CLEAN)


@in_child
def takes_one_by_one(path: str) -> int:
    """Takes one packet each time that it is told to; how many were large."""
    device = backend(f"net_vhost0,iface={path},tso=1", frame_size=16384, mtu=9000)
    with DpdkDevice(None, device) as device:
        port, large = RawPort(device), 0
        say("ready")
        while hear() != "end":
            large += sum(len(f.data) > 1514 for f in port.recv(1, 5))
            say("taken")
        return large


@in_child
def fills_the_ring(path: str) -> dict[str, Any]:
    """Gives single segments, and bursts of 32 that may be joined: its other side takes one packet at a time."""
    with DpdkDevice(None, backend(f"net_virtio_user0,path={path}")) as device:
        nd, seq, segment, out = device.netdev, 0, tcp_frame(0, 400), ffi.new("bypass_pkt[]", 64)
        until(lambda: device.health() == 0)

        def give(n: int) -> int:
            nonlocal seq
            frames = ffi.new("bypass_pkt[]", burst(nd, n))
            for i, frame in enumerate(frames):
                m = meta_of(nd, frame)
                at = nd.mem + frame * nd.stride + m.off
                ffi.memmove(at, segment, len(segment))
                ffi.memmove(at + 38, (seq + 400 * i).to_bytes(4, "big"), 4)
                m.len, m.flags, m.csum_start, m.csum_off = len(segment), lib.BYPASS_TX_CSUM, 34, 16
            sent = int(nd.ops.tx_burst(nd, frames, len(frames)))
            seq += 400 * sent
            nd.ops.free(nd, frames, len(frames))
            nd.ops.reap(nd, out, 64)
            return sent

        def large() -> int:
            return device.statistics()[0]["tso_packets"]

        say([sum(give(1) for _ in range(20)), sum(give(32) for _ in range(60)), give(32)])
        each = []
        while hear() != "end":
            before = large()
            say(sum(give(32) for _ in range(20)))
            each.append(large() - before)
        return {"large": each, "after": places(device)}


def test_a_ring_that_is_full_is_no_refusal(tmp_path: Path) -> None:
    """Twenty times in a row there is room for a single segment, and for no large packet."""
    path = str(tmp_path / "vhost.sock")
    with takes_one_by_one.start(path) as taker:
        assert taker.line() == "ready"
        with fills_the_ring.start(path) as giver:
            singles, others, last = giver.line()
            assert (singles, last) == (20, 0)
            assert others > 3 * 32
            for _ in range(26):
                taker.tell("one")
                assert taker.line() == "taken"
                giver.tell("more")
                assert giver.line() > 0, "what one packet leaves behind is used"
            giver.tell("end")
            got = giver.result()
        taker.tell("end")
        large = taker.result()
    assert sum(got["large"][:20]) == 0
    assert sum(got["large"][20:]) > 0, "large packets are tried again"
    assert large > 0
    assert got["after"] == CLEAN


# ---- Packets larger than a frame -----------------------------------------------------------------------------------
def memif(role: str, path: str) -> str:
    return f"net_memif0,role={role},id=0,socket={path},socket-abstract=no"


@in_child
def takes_large_packets(path: str, frame_size: int) -> dict[str, Any]:
    with DpdkDevice(None, backend(memif("server", path), frame_size=frame_size)) as device:
        port, frames = RawPort(device), []
        say("ready")
        while sum(s["rx_packets"] + s["rx_bad"] for s in device.statistics().values()) < 3:
            frames += port.recv(10, 0.1)
        hear()
        ours = device.statistics()[0]
        audit = device.audit()
        return {
            "lengths": [len(f.data) for f in frames],
            "intact": all(f.data[14:] == bytes(i % 251 for i in range(len(f.data) - 14)) for f in frames),
            "bad": ours["rx_bad"],
            "conserved": audit.conserved,
            "held": audit.stack + audit.stack_tx + audit.misplaced,
        }


@in_child
def gives_large_packets(path: str) -> str:
    with DpdkDevice(None, backend(memif("client", path), frame_size=8192, mtu=5000)) as device:
        port = RawPort(device)
        while device.health():
            pass
        head = b"\xff" * 6 + b"\x02" * 6 + b"\x08\x00"
        port.send([head + bytes(i % 251 for i in range(n)) for n in (1000, 4000, 60)])
        hear()
        return "sent"


@pytest.mark.parametrize(("frame_size", "lengths"), [(8192, [1014, 4014, 74]), (2048, [1014, 74])])
def test_a_packet_that_comes_in_pieces_becomes_one_frame_or_is_counted(
    tmp_path: Path, frame_size: int, lengths: list[int]
) -> None:
    path = str(tmp_path / "memif.sock")
    with takes_large_packets.start(path, frame_size) as taker:
        assert taker.line() == "ready"
        with gives_large_packets.start(path) as giver:
            taker.tell("done")
            got = taker.result()
            giver.tell("done")
            assert giver.result() == "sent"
    assert got["lengths"] == lengths
    assert got["bad"] == 3 - len(lengths)
    assert (got["intact"], got["conserved"], got["held"]) == (True, True, 0)


def chain_maker(folder: Path) -> str:
    """tests/c/dpdk_chain.c as a library."""
    flags = run("pkg-config", "--cflags", "libdpdk").split()
    libs = run("pkg-config", "--libs-only-L", "libdpdk").split()
    out = folder / "dpdk_chain.so"
    system = [f.replace("-I", "-isystem") if f.startswith("-I") else f for f in flags]
    run(
        *("gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", *system),
        *("tests/c/dpdk_chain.c", *libs, "-lrte_mbuf", "-lrte_mempool", "-lrte_ring", "-lrte_eal", "-o", out),
    )
    return str(out)


def numbered(size: int) -> bytes:
    return b"\xff" * 6 + b"\x02" * 6 + b"\x08\x00" + bytes(i % 251 for i in range(size - 14))


@in_child
def takes_chains(library: str, pool: str) -> dict[str, Any]:
    """A port is given packets in pieces of 100 bytes, of the pool: as long as a frame holds, longer, and (where the
    pool is not the port's) one while the port has no frame left."""
    with DpdkDevice(None, backend("net_ring0", frames=600)) as device:
        maker, name, port = CDLL(library), pool.encode(), RawPort(device)
        foreign = pool != "bypass0"  # the port's own
        assert not foreign or maker.chain_pool(name) == 0
        free = maker.chain_free_in(name)

        def put(size: int) -> bool:
            data = numbered(size)
            assert maker.chain_put(b"ETH_RXTX0_net_ring0", name, data, size, 100) == 0
            return [f.data for f in port.recv(10, 0.05)] == [data]

        right = [put(size) for size in (90, 101, 1514, 2048, 2049, 1000)]
        if foreign:
            taken = maker.chain_take_all(b"bypass0")
            right += [taken > 500 and put(1000)]
            maker.chain_give_back()
            right += [put(1000)]
        ours = device.statistics()[0]
        return {
            "right": right,
            "bad": ours["rx_bad"],
            "joined": ours["rx_linearized"],
            "leaked": free - maker.chain_free_in(name),
            "after": places(device),
        }


@pytest.mark.parametrize("pool", ["bypass0", "another"])
def test_pieces_are_joined_where_they_fit_and_none_is_lost(tmp_path: Path, pool: str) -> None:
    got = takes_chains(chain_maker(tmp_path), pool)
    right = [True, True, True, True, False, True]
    if pool == "another":
        right += [False, True]
    assert got["right"] == right
    assert got["bad"] == right.count(False)
    assert got["joined"] == right.count(True) - 1, "the first one is whole"
    assert (got["leaked"], got["after"]) == (0, CLEAN)
