# SPDX-License-Identifier: Apache-2.0
"""The exception path: a TAP device that is made whole or not at all, and goes with its descriptor."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bypass._core import ffi, lib

from bypass import netns
from bypass.dpdk_backend.filter import ExceptionPath
from bypass.dpdk_backend.tap import dress, follow, limit, open_tap, tap_name
from bypass.errors import DeviceError, PrivilegeError
from bypass.policy import Policy, parse_policy

MAC = bytes.fromhex("02000000beef")
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
FLOWS = "flows: [{name: web, match: {proto: tcp, local_port: 80}, action: steer}]\n"


def policy(interface: str = "tap7", backend: str = "", rest: str = "") -> Policy:
    head = f"version: 1\ninterface: {interface}\nbackend: {{kind: dpdk, device: net_null0{backend}}}\n"
    return parse_policy(head + rest + FLOWS)


@pytest.fixture
def ns(namespace: str) -> Iterator[None]:
    """The test is in its own network namespace."""
    with netns.entered(namespace):
        yield


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def shown(name: str) -> str:
    return subprocess.run(
        ["ip", "-d", "addr", "show", name], capture_output=True, text=True, check=True
    ).stdout


def in_child(work: Callable[[], object]) -> str:
    """What work returns, or its error, in a forked child that may change who and where it is."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(work())
        except (DeviceError, PrivilegeError, OSError, AssertionError) as e:
            text = f"{type(e).__name__}: {e}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read, "rb") as f:
        return f.read().decode()


@pytest.mark.netns
def test_the_device_is_what_the_policy_says_and_goes_with_its_descriptor(ns: None) -> None:
    p = policy(rest="addresses: [192.0.2.10/24]\nroutes: [{to: 198.51.100.0/24, via: 192.0.2.20}]\n")
    fd = open_tap(p)
    try:
        assert "tap7" in interfaces()
        assert "state DOWN" in shown("tap7")
        for mtu in (1400, 1300):  # it may be told again
            dress(p, MAC, mtu)
            about = shown("tap7")
            assert f"mtu {mtu}" in about
            assert "link/ether 02:00:00:00:be:ef" in about
            assert "inet 192.0.2.10/24" in about
            assert "tap pi off" in about
            assert "persist off" in about
        routes = subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout
        assert "198.51.100.0/24 via 192.0.2.20 dev tap7" in routes
        assert not os.get_blocking(fd)
    finally:
        os.close(fd)
    assert "tap7" not in interfaces()


@pytest.mark.netns
def test_frames_go_both_ways_until_the_device_is_deleted(ns: None) -> None:
    p = policy(rest="addresses: [192.0.2.10/24]\n")
    path = ExceptionPath(open_tap(p), 1000)
    try:
        frame, buf = b"\xff" * 6 + MAC + b"\x88\xb5" + b"x" * 50, ffi.new("char[]", 2000)
        lib.exception_round(path.c, 1)
        assert lib.exception_write(path.c, frame, len(frame)) == lib.EXCEPTION_LOST, "it is down"
        dress(p, MAC, 1500)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as kernel:
            kernel.bind(("tap7", 0x88B5))
            kernel.settimeout(10)
            assert lib.exception_write(path.c, frame, len(frame)) == lib.EXCEPTION_PASSED
            assert kernel.recv(2000) == frame
            kernel.send(frame + b"y")
            found = b""
            while not found.endswith(b"y"):  # the kernel also says what it likes to a new device
                lib.exception_round(path.c, 1)
                found = ffi.buffer(buf, lib.exception_read(path.c, buf, 2000))[:]
            assert found == frame + b"y"
        path.set_carrier(False)
        assert "NO-CARRIER" in shown("tap7")
        path.set_carrier(True)
        assert "NO-CARRIER" not in shown("tap7")
        subprocess.run(["ip", "link", "del", "tap7"], check=True)
        assert lib.exception_read(path.c, buf, 2000) == 0
        assert path.c.gone == 1
        assert lib.exception_write(path.c, frame, len(frame)) == lib.EXCEPTION_LOST
        assert (path.counters()["passed"], path.counters()["errors"]) == (1, 2)
    finally:
        path.close()


@pytest.mark.netns
@pytest.mark.parametrize("vlan", [False, True])
def test_its_mtu_is_the_ports_or_less(ns: None, vlan: bool) -> None:
    """Less, where somebody has set it so. With a VLAN there are two devices, one on top of the other."""
    p = policy(backend=", vlan: 7" if vlan else "")
    names = ("tap7-p", "tap7") if vlan else ("tap7",)

    def has() -> set[int]:
        return {int(m[1]) for name in names if (m := re.search(r" mtu (\d+) ", shown(name)))}

    def give(mtu: int) -> None:
        for name in names:
            subprocess.run(["ip", "link", "set", name, "mtu", str(mtu)], check=True)

    fd = open_tap(p)
    try:
        try:
            dress(p, MAC, 1500)
        except DeviceError as e:
            assert "modprobe 8021q" in str(e)  # noqa: PT017 - where the kernel has none
            return
        for was, mtu in ((1500, 1400), (1400, 1600)):
            follow(p, MAC, mtu, was)
            assert has() == {mtu}
        limit(p, 1600)
        assert has() == {1600}
        give(9000)
        limit(p, 1600)
        assert has() == {1600}
        give(1300)
        for was, mtu, expected in (
            (1600, 1600, 1300),
            (1600, 1500, 1300),
            (1500, 1200, 1200),
            (1200, 1500, 1500),
        ):
            follow(p, b"\x02" + MAC[1:5] + b"\x01", mtu, was)
            assert has() == {expected}, (was, mtu)
        assert all("02:00:00:00:be:01" in shown(name) for name in names)
    finally:
        os.close(fd)


@pytest.mark.netns
def test_a_name_that_is_taken_is_told_and_its_device_left_alone(ns: None) -> None:
    subprocess.run(["ip", "link", "add", "tap7", "type", "veth"], check=True)
    with pytest.raises(
        DeviceError, match=r"^tap7: a device of this name exists: `interface` of a dpdk policy"
    ):
        open_tap(policy())
    assert "veth" in shown("tap7")
    fd = open_tap(policy("tap8"))
    with pytest.raises(DeviceError, match="tap8: a device of this name exists"):
        open_tap(policy("tap8"))
    os.close(fd)


@pytest.mark.netns
def test_a_port_with_a_vlan_has_its_device_below_another_name(ns: None) -> None:
    p = policy("interface-of-15", ", vlan: 7")
    assert tap_name(p) == "interface-of--p"
    fd = open_tap(p)
    try:
        assert interfaces() == {"lo", "interface-of--p"}
        try:
            dress(p, MAC, 1500)
        except DeviceError as e:
            assert "modprobe 8021q, or exception: none" in str(e)  # noqa: PT017 - where the kernel has none
        else:
            assert "vlan protocol 802.1Q id 7" in shown("interface-of-15")
    finally:
        os.close(fd)


@pytest.mark.netns
def test_without_privilege_the_error_names_the_capability(ns: None) -> None:
    def work() -> object:
        os.setgroups([])
        os.setresuid(65534, 65534, 65534)
        return open_tap(policy())

    said = in_child(work)
    assert said.startswith(PrivilegeError.__name__), said
    assert "CAP_NET_ADMIN" in said or "/dev/net/tun: Permission denied" in said
    assert interfaces() == {"lo"}


@pytest.mark.netns
def test_without_tun_devices_the_error_says_what_to_do(ns: None, tmp_path: Path) -> None:
    def work() -> object:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(CLONE_NEWNS) == 0
        assert libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b"none", b"/dev/net", b"tmpfs", 0, None) == 0
        return open_tap(policy())

    said = in_child(work)
    assert said.startswith("DeviceError: tap7: /dev/net/tun: No such file or directory"), said
    assert "modprobe tun" in said
    assert "exception: none" in said


# ---- Over a socket in place of the device ---------------------------------------------------------------------------
@pytest.fixture
def pair() -> Iterator[tuple[ExceptionPath, socket.socket]]:
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    path = ExceptionPath(ours.detach(), 1000, 2)
    yield path, kernel
    path.close()
    kernel.close()


@pytest.mark.parametrize("rate", [1, 3, 1000, 10_000_000])
def test_the_bucket_gives_the_rate_and_no_more(pair: tuple[ExceptionPath, socket.socket], rate: int) -> None:
    path, _ = pair
    lib.exception_adopt(path.c, path.c.fd, rate, 5)
    start, given = 10**15, 0
    step = 10**9 // (4 * rate) or 1
    for n in range(4000):
        lib.exception_round(path.c, start + n * step)
        given += bool(lib.exception_admit(path.c))
    earned = 5 + (3999 * step * rate) // 10**9
    assert earned - 1 <= given <= earned
    lib.exception_round(path.c, start)  # time that runs backwards gives nothing
    lib.exception_round(path.c, start)
    before = given
    while lib.exception_admit(path.c):
        given += 1
    assert given - before <= 5


def test_an_hour_of_silence_fills_the_bucket_once(pair: tuple[ExceptionPath, socket.socket]) -> None:
    path, _ = pair
    for rate, burst in ((1, 5), (3, 2), (10_000_000, 7)):
        lib.exception_adopt(path.c, path.c.fd, rate, burst)
        lib.exception_round(path.c, 1)
        while lib.exception_admit(path.c):
            pass
        lib.exception_round(path.c, 3600 * 10**9)
        given = 0
        while lib.exception_admit(path.c):
            given += 1
        assert given == burst


def test_a_full_bucket_stays_full(pair: tuple[ExceptionPath, socket.socket]) -> None:
    path, _ = pair
    lib.exception_adopt(path.c, path.c.fd, 10, 8)
    for time_ns in (1, 700_000_001, 1_400_000_001):
        lib.exception_round(path.c, time_ns)
    given = 0
    while lib.exception_admit(path.c):
        given += 1
    assert given == 8


def test_a_round_has_so_many_writes_and_reads(pair: tuple[ExceptionPath, socket.socket]) -> None:
    path, kernel = pair
    frame, buf = b"f" * 60, ffi.new("char[]", 100)
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    lib.exception_round(path.c, 1)
    results = []
    for _ in range(lib.EXCEPTION_WRITES + 1):
        results.append(lib.exception_write(path.c, frame, 60))
        if results[-1] == lib.EXCEPTION_PASSED:
            assert kernel.recv(100) == frame
    assert results == [lib.EXCEPTION_PASSED] * lib.EXCEPTION_WRITES + [lib.EXCEPTION_LATER]
    read = 0
    for _ in range(lib.EXCEPTION_READS + 1):
        kernel.send(frame)
        read += lib.exception_read(path.c, buf, 100) == 60
    assert read == lib.EXCEPTION_READS
    lib.exception_round(path.c, 1)
    assert lib.exception_read(path.c, buf, 100) == 60
