# SPDX-License-Identifier: Apache-2.0
"""A DPDK port without any NIC: frames and who holds them, opening and closing, every failure as one sentence."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bypass._core import ffi, lib
from dpdk_support import CLEAN, PLAIN, Node, backend, in_child, needs_dpdk, places, until

from bypass.dpdk_backend import DpdkDevice
from bypass.dpdk_backend.eal import eal_arguments, port_config
from bypass.errors import BypassError
from bypass.raw import RawPort

__all__ = ["needs_dpdk"]

FRAME = b"\xff" * 6 + b"\x02" * 6 + b"\x08\x00" + bytes(range(60))


def refused(device: str, **options: Any) -> str:
    try:
        DpdkDevice(None, backend(device, **options)).close()
    except BypassError as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- Frames --------------------------------------------------------------------------------------------------------
@in_child
def frames_around_a_ring() -> dict[str, Any]:
    with DpdkDevice(None, backend("net_ring0")) as device:
        port = RawPort(device)
        sent = port.send([FRAME + bytes([i]) for i in range(200)])
        under_way = places(device)
        data = [f.data for f in port.recv(1024, 1)]
        more = port.recv(10, 0)
        ours, theirs = device.statistics()[0], device.device_statistics()
        extended = device.extended_statistics()
        return {
            "sent": sent,
            "same": data == [FRAME + bytes([i]) for i in range(200)],
            "more": len(more),
            "under_way": under_way,
            "after": places(device),
            "ours": [ours[n] for n in ("tx_packets", "rx_packets", "tx_bytes", "rx_bytes", "tx_completed")],
            "theirs": [theirs["opackets"], theirs["ipackets"]],
            "extended": [extended["tx_good_packets"], extended["rx_good_packets"]],
        }


def test_frames_come_back_from_a_ring_in_order_and_all_counters_agree() -> None:
    """A ring hands over the very mbuf that was sent: its sender's hold has to end by itself."""
    got = frames_around_a_ring()
    assert (got["sent"], got["same"], got["more"]) == (200, True, 0)
    assert got["after"] == CLEAN
    assert got["ours"] == [200, 200, 200 * 75, 200 * 75, 200]
    assert got["theirs"] == got["extended"] == [200, 200]
    assert got["under_way"]["conserved"]


@in_child
def a_pool_used_up() -> dict[str, Any]:
    with DpdkDevice(None, backend("net_ring0", frames=600)) as device:
        nd = device.netdev
        out = ffi.new("bypass_pkt[]", 600)
        got = nd.ops.alloc(nd, out, 600)
        none = nd.ops.alloc(nd, out + got, 1)
        held = device.audit()
        nd.ops.free(nd, out, got)
        again = nd.ops.alloc(nd, out, 1)
        twice = ffi.new("bypass_pkt[]", [out[0], out[0]])
        nd.ops.free(nd, twice, 2)
        return {
            "got": got,
            "none": none,
            "left_for_reception": held.free,
            "held": held.stack,
            "again": again,
            "bad_free": device.audit().bad_free,
            "free": device.audit().free,
            "free_frames": nd.free_frames,
        }


def test_a_pool_that_is_used_up_keeps_frames_for_reception_and_recovers() -> None:
    got = a_pool_used_up()
    assert got["got"] + got["left_for_reception"] == 600
    assert got["held"] == got["got"] == got["free_frames"]
    assert (got["none"], got["again"], got["free"]) == (0, 1, 600)
    assert 64 <= got["left_for_reception"] < 100
    assert got["bad_free"] == 1


@in_child
def misuse() -> list[int]:
    with DpdkDevice(None, backend("net_null0")) as device:
        nd = device.netdev
        out = ffi.new("bypass_pkt[]", 2)
        nd.ops.alloc(nd, out, 2)
        meta = ffi.cast("struct bypass_pkt_meta *", ffi.cast("char *", nd.meta) + out[0] * nd.meta_stride)
        results = []
        for off, length in ((nd.headroom, 13), (0, 100), (nd.headroom, nd.stride - nd.headroom + 1)):
            meta.off, meta.len = off, length
            results.append(nd.ops.tx_burst(nd, out, 1))
        results.append(nd.ops.tx_burst(nd, ffi.new("bypass_pkt[]", [nd.frames]), 1))
        meta.off, meta.len = nd.headroom, 60
        results.append(
            nd.ops.tx_burst(nd, ffi.new("bypass_pkt[]", [out[0], out[0]]), 2)
        )  # the second: the same
        nd.ops.free(nd, out, 2)
        nd.ops.reap(nd, out, 2)
        results.append(device.audit().free == nd.frames)
        return [*results, device.statistics()[0]["tx_invalid"]]


def test_a_frame_that_is_no_packet_is_refused() -> None:
    assert misuse() == [-22, -22, -22, -22, 1, True, 5]


@in_child
def sleeps_with_nothing_to_receive() -> dict[str, Any]:
    with DpdkDevice(None, backend("net_ring0", idle_us=100)) as device:
        port = RawPort(device)

        def woken() -> int:
            before = device.statistics()[0]["rx_idle"]
            port.recv(1, 0.5)
            return int(device.statistics()[0]["rx_idle"]) - before

        first = woken()
        port.send([FRAME])
        port.recv(1, 1)
        port.recv(1, 0)  # and sleeps, as far as the port knows
        wait_fd = device.netdev.ops.wait_fd(device.netdev)
        timer = int(Path(f"/proc/self/fdinfo/{wait_fd}").read_text().split("tfd:")[1].split()[0])
        text = Path(f"/proc/self/fdinfo/{timer}").read_text()
        seconds, ns = text.split("it_value: (")[1].split(")")[0].split(",")
        return {"woken": first, "left_ns": int(seconds) * 10**9 + int(ns)}


def test_who_waits_long_is_woken_less_often() -> None:
    """Half a second would be 5,000 times 100 us; what arrives makes it 100 us again."""
    got = sleeps_with_nothing_to_receive()
    assert 1 <= got["woken"] < 1000
    assert got["left_ns"] <= 100_000


# ---- Opening and closing -------------------------------------------------------------------------------------------
@in_child
def again_and_again() -> dict[str, Any]:
    before = os.sched_getaffinity(0)
    frames, pools = [], []
    for device in ("net_ring0", "net_ring0", "net_null0", "net_ring0"):
        with DpdkDevice(None, backend(device)) as one:
            frames.append(places(one))
            pools.append(one.audit().frames)
    with DpdkDevice(None, backend("net_ring0")) as a, DpdkDevice(None, backend("net_ring1")) as b:
        busy = refused("net_ring0")
        RawPort(a).send([FRAME])
        RawPort(b).send([FRAME] * 2)
        counts = [len(RawPort(a).recv(10, 1)), len(RawPort(b).recv(10, 1))]
    return {
        "frames": frames,
        "pools": pools,
        "busy": busy,
        "counts": counts,
        "affinity": before == os.sched_getaffinity(0),
    }


def test_a_device_opens_again_after_closing_and_two_at_once_are_apart() -> None:
    got = again_and_again()
    assert got["frames"] == [CLEAN] * 4
    assert got["pools"] == [4 * 256] * 4
    assert got["counts"] == [1, 2]
    assert "net_ring0 is open in this process already" in got["busy"]
    assert got["affinity"], "EAL left the calling thread pinned to a CPU"


@in_child
def failures() -> dict[str, str]:
    said = {
        "driver": refused("net_nonsense0"),
        "interface": refused("net_af_packet0,iface=nowhere9"),
        "frames": refused("net_null0", frames=100),
        "queues": refused("net_af_packet0,iface=lo", queues=2),
        "mtu": refused("net_null0", mtu=3000),
        "memory": refused("net_null0", frames=400_000),
        "pci": refused("0000:ff:1f.7"),
        "bond": refused("net_bonding0,mode=1"),
    }
    said["second"] = refused("net_null0", eal=replace(PLAIN, memory=64 << 20))
    with DpdkDevice(None, backend("net_null0")) as device:
        said["works"] = device.about().driver
        said["left"] = str(device.audit().frames)
    return said


def test_each_failure_is_one_sentence_and_nothing_of_it_is_left() -> None:
    said = failures()
    for name, words in {
        "driver": ["DeviceError", "net_nonsense0", "no DPDK device"],
        "interface": ["DeviceError", "nowhere9", "No such device"],
        "frames": ["100 frames", "576 at least", "ring_size"],
        "queues": ["2 queues", "it has 1", "qpairs=2"],
        "mtu": ["3000", "frame_size 2048"],
        "memory": ["400000 frames", "backend.eal.memory"],
        "pci": ["no PCI device 0000:ff:1f.7", "bypass nic list"],
        "bond": ["no members", "slave="],
        "second": ["other arguments", "backend.eal"],
    }.items():
        assert all(word in said[name] for word in words), f"{name}: {said[name]!r}"
        assert "\n" not in said[name]
    assert (said["works"], said["left"]) == ("net_null", str(4 * 256))


@in_child
def without_hugepages() -> list[str]:
    return [refused("net_null0", eal=replace(PLAIN, hugepages=True)), refused("net_null0")]


def test_missing_hugepages_are_an_error_that_leaves_another_try() -> None:
    pages = Path("/sys/kernel/mm/hugepages").glob("*/free_hugepages")
    if any(int(p.read_text()) for p in pages):
        pytest.skip("not here: this machine has free hugepages")
    first, second = without_hugepages()
    assert "no hugepages are free" in first
    assert "backend.eal.hugepages: false" in first
    assert second == ""


@in_child
def no_plugin() -> str:
    os.environ["BYPASS_DPDK"] = "/nowhere/bypass-dpdk.so"
    os.putenv("BYPASS_DPDK", "/nowhere/bypass-dpdk.so")
    return refused("net_null0")


def test_a_plugin_that_is_missing_is_named() -> None:
    assert no_plugin() == (
        "DeviceError: the DPDK plug-in /nowhere/bypass-dpdk.so cannot be read: No such file or directory"
    )


# ---- A stack on it -------------------------------------------------------------------------------------------------
@in_child
def stack_on_a_ring() -> dict[str, Any]:
    """Two ports of one process whose rings are crossed would be a wire; one alone gives back what it sends."""
    with DpdkDevice(None, backend("net_ring0")) as device:
        node = Node(device, "192.0.2.1")
        core = node.core
        sock = core.socket(lib.BYPASS_DGRAM)
        core.bind(sock, ("192.0.2.1", 7))
        core.nexthop_set("192.0.2.2", bytes(device.netdev.mac))
        core.sendto(sock, b"x" * 100, ("192.0.2.2", 7))
        until(lambda: device.statistics()[0]["rx_packets"] > 0, node)
        return {"rx": device.statistics()[0]["rx_packets"], "after": node.settled()}


def test_what_a_stack_hears_of_itself_leaves_no_frame_behind() -> None:
    got = stack_on_a_ring()
    assert got["rx"] > 0
    assert got["after"] == CLEAN


# ---- Translation ---------------------------------------------------------------------------------------------------
def test_the_arguments_of_eal_follow_from_the_policy_and_name_no_device() -> None:
    plain = eal_arguments(backend("0000:03:00.0"))
    assert plain == eal_arguments(backend("net_af_packet0,iface=x")), "one EAL serves ports of all kinds"
    assert plain[1:3] == ["-l", "0"]
    assert plain[plain.index("-m") + 1] == "512"
    assert {"--no-huge", "--no-shconf", "--no-telemetry"} <= set(plain)
    huge = eal_arguments(
        backend("net_null0", eal=replace(PLAIN, hugepages=True, lcores=(1, 3), drivers="/x"))
    )
    assert huge[1:3] == ["-l", "1,3"]
    assert "--in-memory" in huge
    assert "-m" not in huge
    assert huge[huge.index("-d") + 1] == "/x"


def test_members_of_a_bond_travel_in_its_device() -> None:
    eal = replace(PLAIN, devices=("net_af_packet1,iface=a", "net_af_packet10,iface=b", "net_null7"))
    bond = backend("net_bonding0,mode=1,slave=net_af_packet1,slave=net_af_packet10", eal=eal)
    assert port_config(bond)["device"] == (
        b"net_bonding0,mode=1,slave=(net_af_packet1,iface=a),slave=(net_af_packet10,iface=b)"
    )
    assert eal_arguments(bond)[-2:] == ["--vdev", "net_null7"]
