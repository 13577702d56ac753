# SPDX-License-Identifier: Apache-2.0
"""Congestion control as such: its names, the interface for others, when it is asked, and what every algorithm shares
(initial window, windows that are not used, pauses)."""

from __future__ import annotations

import ctypes
import errno
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from bypass._core import ffi, lib
from cc_bench import EV_LOSS, EV_RTO, INFINITE, Bottleneck, ByHand
from tcp_talk import Talk
from test_tcp_ecn import arrive

from bypass.core import CoreStack
from bypass.sim.network import Network

ROOT = Path(__file__).parent.parent
MSS = 1000
OPTS = f"mss {MSS}, nop, ws 7"


def ack(n: int) -> str:
    return f". 1:1 ack {1 + n * MSS} win 4096"


def refused(code: int, call: Any, *args: Any) -> None:
    with pytest.raises(OSError, match=rf"\[Errno {code}\]"):
        call(*args)


# ---- Names -------------------------------------------------------------------------------------------------------
def test_the_default_is_cubic() -> None:
    with Talk(cc="cubic") as t:
        assert t.stack.cc_names() == ["cubic", "reno", "dctcp", "bbr"]
    with Network(1) as net:
        net.wire()
        core = net.stack("10.0.0.1/24").core
        assert core.cc_get(core.socket(lib.BYPASS_STREAM)) == "cubic"


def test_connections_inherit_their_listeners() -> None:
    with Talk() as t:
        t.server()
        t.stack.cc_set(t.listener, "bbr")
        t.peer("S 0:0 <mss 1000>")
        t.out()
        t.peer(". 1:1 ack 1")
        assert t.stack.cc_get(t.accept()) == "bbr"


def test_an_unknown_name_is_enoent() -> None:
    with Talk() as t:
        t.server()
        refused(errno.ENOENT, t.stack.cc_set, t.listener, "vegas")
        refused(errno.ENOENT, t.stack.cc_default, "")
        refused(errno.EBADF, t.stack.cc_set, 12345, "reno")
        udp = t.stack.socket(lib.BYPASS_DGRAM)
        refused(errno.EOPNOTSUPP, t.stack.cc_set, udp, "reno")
        out = ffi.new("char[4]")
        assert lib.bypass_cc_get(t.stack.c, t.listener, out, 4) == -errno.ERANGE


def test_a_live_connection_switches_at_once_and_keeps_its_window() -> None:
    with Talk(sndbuf=1 << 20, frames=1024) as t:
        t.established(opts=OPTS, rtt=0.01)
        t.write(30 * MSS)
        t.out()
        t.advance(0.01)
        t.peer(ack(2))
        cwnd = t.info.cwnd
        for name in ("bbr", "dctcp", "cubic", "reno"):
            t.stack.cc_set(t.sock, name)
            assert t.stack.cc_get(t.sock) == name
            assert t.info.cwnd == cwnd
        t.out()
        t.peer(ack(4))
        assert t.info.cwnd > cwnd
        t.peer("R 1:1")


def test_sockets_say_tcp_congestion_as_on_linux() -> None:
    with Network(1) as net:
        net.wire()
        stack = net.stack("10.0.0.1/24")
        s = stack.socket()
        name = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        assert name == b"cubic".ljust(16, b"\0")
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        assert s.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16) == b"reno".ljust(16, b"\0")
        for value in (b"nothing", 5, b"\xff\xfe", b"x" * 40):
            refused(errno.ENOENT, s.setsockopt, socket.IPPROTO_TCP, socket.TCP_CONGESTION, value)
        refused(errno.EINVAL, s.setsockopt, socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"")
        s.close()


# ---- One's own -----------------------------------------------------------------------------------------------------
def table(name: bytes, keep: list[Any], flags: int = 0, **functions: Any) -> Any:
    """A struct bypass_cc_ops of Python functions; `keep` holds what must outlive it."""
    kinds = {
        "init": "void(struct bypass_cc *)",
        "acked": "void(struct bypass_cc *, const struct bypass_cc_sample *)",
        "ssthresh": "uint32_t(struct bypass_cc *, int)",
        "event": "void(struct bypass_cc *, int)",
    }
    ops = ffi.new("struct bypass_cc_ops *", {"name": ffi.new("char[]", name), "flags": flags})
    keep.append(ops)
    text = ffi.new("char[]", name)
    keep.append(text)
    ops.name = text
    for key, f in functions.items():
        callback = ffi.callback(kinds[key], f)
        keep.append(callback)
        setattr(ops, key, callback)
    return ops


def test_a_programs_own_algorithm_sees_what_is_documented_and_decides() -> None:
    """bypass.h "Congestion control": units, when each function is called, and that cwnd is taken."""
    keep: list[Any] = []
    seen: list[tuple[str, Any]] = []

    def init(cc: Any) -> None:
        seen.append(("init", (cc.cwnd, cc.ssthresh, cc.mss, cc.min_rtt_us)))
        ffi.cast("uint64_t *", cc.state)[15] = 7

    def acked(cc: Any, sm: Any) -> None:
        state = ffi.cast("uint64_t *", cc.state)
        seen.append(("acked", (sm.acked, sm.rtt_us, cc.srtt_us, cc.in_flight, cc.limited, state[15])))
        cc.cwnd = 33 * MSS

    def ssthresh(cc: Any, event: int) -> int:
        seen.append(("ssthresh", (event, cc.flight_size)))
        return 5555

    with Talk(sndbuf=1 << 20, frames=1024) as t:
        ops = table(b"own", keep, init=init, acked=acked, ssthresh=ssthresh)
        assert lib.bypass_cc_register(t.stack.c, ops) == 0
        assert lib.bypass_cc_register(t.stack.c, ops) == -errno.EEXIST
        assert t.stack.cc_names()[-1] == "own"
        t.stack.cc_default("own")
        t.established(opts=OPTS, rtt=0.01)
        t.write(40 * MSS)
        t.out()
        t.advance(0.02)
        t.peer(ack(2))
        assert seen[0] == ("init", (10 * MSS, INFINITE, MSS, seen[0][1][3]))
        assert seen[1][0] == "acked"
        acked_bytes, rtt, srtt, in_flight, limited, word = seen[1][1]
        assert (acked_bytes, in_flight, limited, word) == (2 * MSS, 8 * MSS, 1, 7)
        assert rtt == pytest.approx(20_000, abs=2)
        assert 10_000 <= srtt <= 20_000
        assert t.info.cwnd == 33 * MSS
        assert len([s for s in t.out() if s.data]) == 25
        t.advance(2)
        assert ("ssthresh", (EV_RTO, 33 * MSS)) in seen
        assert t.info.ssthresh == 5555
        t.peer("R 1:1")


def test_registration_says_what_is_wrong() -> None:
    keep: list[Any] = []
    with Talk() as t:
        register = lib.bypass_cc_register
        assert register(t.stack.c, table(b"reno", keep)) == -errno.EEXIST
        assert register(t.stack.c, table(b"", keep)) == -errno.EINVAL
        assert register(t.stack.c, table(b"sixteen_letters_", keep)) == -errno.EINVAL
        for i in range(lib.BYPASS_CC_MAX):
            assert register(t.stack.c, table(b"cc%d" % i, keep)) == 0
        assert register(t.stack.c, table(b"onemore", keep)) == -errno.ENOSPC


def test_a_process_that_attaches_registers_the_same_names() -> None:
    """Pointers are the process's, names the arena's: until they are all there again bypass_poll() refuses."""
    keep: list[Any] = []
    with Talk() as t:
        assert lib.bypass_cc_register(t.stack.c, table(b"own", keep)) == 0
        env = ffi.new("struct bypass_env *", {"random": t.stack.c.env.random})
        view = ffi.new("struct bypass_stack *")
        size = ffi.cast("size_t", 1 << 40)
        assert lib.bypass_attach(view, t.stack.c.arena, size, t.stack.c.dev, env) == 0
        assert lib.bypass_poll(view, t.now, 0) == -errno.EINVAL
        assert lib.bypass_cc_register(view, table(b"stranger", keep)) == -errno.EINVAL
        assert lib.bypass_cc_table(view, b"own") == ffi.NULL
        assert lib.bypass_cc_register(view, table(b"own", keep)) == 0
        assert lib.bypass_poll(view, t.now, 0) == 0


def test_the_example_algorithm_builds_from_the_header_and_controls_a_transfer(tmp_path: Path) -> None:
    library = tmp_path / "congestion.so"
    subprocess.run(
        [
            "gcc",
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            f"-I{ROOT / 'bypass/include'}",
            str(ROOT / "examples" / "congestion.c"),
            "-o",
            str(library),
        ],
        check=True,
    )
    address = ctypes.addressof(ctypes.c_byte.in_dll(ctypes.CDLL(str(library)), "example_congestion"))
    ops = ffi.cast("const struct bypass_cc_ops *", address)
    with Bottleneck("cubic", rate=20_000_000, rtt_ms=20, queue=200_000) as b:
        assert lib.bypass_cc_register(b.a.core.c, ops) == 0
        b.a.core.cc_set(b.client, "delay")
        b.transfer(2)
        b.rows.clear()
        assert b.transfer(3) > 0.9 * 20_000_000
        assert max(r.srtt_us for r in b.rows) < 30_000, "it keeps the queue short"
        assert b.a.core.stats()["tcp_out_retransmits"] == 0


# ---- Shared by all ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["reno", "cubic", "dctcp", "bbr"])
@pytest.mark.parametrize(("mss", "segments"), [(536, 10), (1448, 10), (2000, 7), (8948, 2)])
def test_the_first_window_is_ten_segments_or_14600_bytes(name: str, mss: int, segments: int) -> None:
    """RFC 6928 2."""
    with Talk(cc=name, mtu=9000, sndbuf=1 << 20) as t:
        t.established(opts=f"mss {mss}, nop, ws 7")
        t.write(11 * mss)
        t.settle()
        window = max(2 * mss, min(10 * mss, max(2 * mss, 14600)))
        assert t.info.cwnd == window
        assert window // mss == segments
        t.out()
        t.peer("R 1:1")


@pytest.mark.parametrize("name", ["reno", "cubic", "dctcp"])
def test_a_window_that_was_used_only_in_part_does_not_grow(name: str) -> None:
    """RFC 7661, RFC 2861: three segments a round trip of ten."""
    with Talk(cc=name, sndbuf=1 << 20) as t:
        t.established(opts=OPTS, rtt=0.01)
        for n in range(1, 40):
            t.write(3 * MSS)
            t.advance(0.01)
            t.peer(ack(3 * n))
        assert t.info.cwnd == 10 * MSS
        t.out()


def test_one_full_flight_counts_for_all_of_its_acks() -> None:
    """RFC 7661 4: used within the round trip, although the last ACKs find little in flight: ten segments, no more."""
    with Talk(sndbuf=1 << 20) as t:
        t.established(opts=OPTS, rtt=0.01)
        t.write(10 * MSS)
        t.out()
        for n in range(1, 11):
            t.peer(ack(n))
        assert t.info.cwnd == 20 * MSS


@pytest.mark.parametrize(("rtos", "share"), [(0.5, 1), (1.5, 2), (2.5, 4)])
def test_a_pause_halves_the_window_for_each_timeout(rtos: float, share: int) -> None:
    """RFC 2861 3.1, RFC 5681 4.1."""
    with Talk(sndbuf=1 << 20, frames=2048) as t:
        cwnd = grown(t)
        t.advance(rtos * t.info.rto_us / 1e6)
        t.write(MSS)
        t.settle()
        assert t.info.cwnd == cwnd // share
        t.out()
        t.peer("R 1:1")


def test_the_window_stays_after_a_pause_when_asked_to() -> None:
    with Talk(sndbuf=1 << 20, frames=2048, config={"keep_idle_window": True}) as t:
        cwnd = grown(t)
        t.advance(30)
        done = t.wrote // MSS
        for n in range(60):
            t.write(MSS)
            t.advance(0.01)
            t.peer(ack(done + n + 1))
            assert t.info.cwnd == cwnd
        t.out()


def test_what_a_pause_took_slow_start_brings_back() -> None:
    """RFC 2861 3.1: ssthresh is at least three quarters of the window of before, or a window learned over many round
    trips would have to be learned again. Before it, ECN halved the first window."""
    with Talk(sndbuf=1 << 20, frames=2048, config={"ecn": 1}) as t:
        t.server()
        arrive(t, f"SEW 0:0 win 65535 <{OPTS}>")
        t.out()
        t.advance(0.01)
        arrive(t, ". 1:1 ack 1 win 4096")
        t.accept()
        t.write(10 * MSS)
        t.advance(0.01)
        arrive(t, f".E 1:1 ack {1 + 10 * MSS} win 4096")
        assert t.info.ssthresh == 5 * MSS
        cwnd = filled(t, 10, 40)
        t.advance(1.5 * t.info.rto_us / 1e6)
        t.write(MSS)
        t.settle()
        assert t.info.cwnd == cwnd // 2
        assert t.info.ssthresh == cwnd - cwnd // 4
        t.out()
        t.peer("R 1:1")


def test_half_of_what_was_not_used_for_a_timeout_goes() -> None:
    """RFC 2861 3.2: counted from when the window was used in full; what was used most since then stays."""
    with Talk(sndbuf=1 << 20, frames=2048) as t:
        cwnd = grown(t)
        done = t.wrote // MSS

        def uses(segments: int) -> None:
            """For 10 ms; one segment more is in flight all the time, so that there is no pause."""
            nonlocal done
            t.write(segments * MSS)
            t.advance(0.01)
            t.out()
            done += segments
            t.peer(ack(done))

        t.write(MSS)
        for segments in (*[10] * 10, t.info.cwnd // MSS - 1, *[10] * 10, 39, *[10] * 8):
            uses(segments)
            assert t.info.cwnd >= cwnd
        cwnd, used = t.info.cwnd, 40 * MSS
        for _ in range(4):
            uses(10)
        assert t.info.cwnd == (cwnd + used) // 2
        for _ in range(23):
            uses(10)
        assert t.info.cwnd == ((cwnd + used) // 2 + 11 * MSS) // 2
        t.out()
        t.peer("R 1:1")


def test_the_ack_that_undoes_a_timeout_counts_as_any_other() -> None:
    """RFC 4015 3.2, RFC 9438 4.9: as if nothing had been: it acknowledges five of ten segments in slow start."""
    with Talk(cc="cubic", sndbuf=1 << 20, frames=1024) as t:
        t.established(opts=f"mss {MSS}, sackok, nop, ws 7", rtt=0.01)
        t.write(30 * MSS)
        t.advance(1)
        t.out()
        t.peer(ack(5))
        assert t.stack.stats()["tcp_undone_timeouts"] == 1
        assert t.info.cwnd == 15 * MSS
        t.out()
        t.peer("R 1:1")


def filled(t: Talk, done: int, segments: int) -> int:
    """Writes whole windows, a round trip of 10 ms each, until there are so many segments; cwnd."""
    while t.info.cwnd < segments * MSS:
        n = t.info.cwnd // MSS
        t.write(n * MSS)
        t.advance(0.01)
        for _ in range(n):
            done += 1
            t.peer(ack(done))
    t.out()
    return int(t.info.cwnd)


def grown(t: Talk) -> int:
    t.established(opts=OPTS, rtt=0.01)
    return filled(t, 0, 80)


def test_idle_connections_hold_no_record() -> None:
    """CUBIC and Reno before a loss: nothing is kept when nothing is in flight. DCTCP and BBR keep what they learned."""
    for name, kept in (("reno", 0), ("cubic", 0), ("dctcp", 1), ("bbr", 1)):
        with Talk(cc=name) as t:
            t.established(opts=OPTS, rtt=0.01)
            t.write(MSS)
            t.advance(0.01)
            t.peer(ack(1))
            assert t.stack.audit()["flights"] == kept, name
            t.out()


# ---- Reno ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def stack() -> Any:
    with Talk() as t:
        yield t.stack


def test_reno_halves_what_was_in_flight(stack: CoreStack) -> None:
    """RFC 5681 equation 4: FlightSize, not cwnd; at least two segments."""
    h = ByHand(stack, "reno", cwnd=100 * 1448)
    assert h.reduce(EV_LOSS, 60 * 1448) == 30 * 1448
    assert h.reduce(EV_LOSS, 1448) == 2 * 1448


def test_reno_counts_bytes_of_stretched_acks(stack: CoreStack) -> None:
    """RFC 3465 2.1, 2.3: congestion avoidance is the same for any number of ACKs; slow start takes two segments of
    each; after a timeout, one."""
    fine, coarse = (ByHand(stack, "reno", cwnd=100 * 1448) for _ in range(2))
    for h in (fine, coarse):
        h.cc.ssthresh = 50 * 1448
    for _ in range(1000):
        fine.ack(1448)
    for _ in range(100):
        coarse.ack(10 * 1448)
    assert abs(fine.cc.cwnd - coarse.cc.cwnd) <= 1448
    start = ByHand(stack, "reno", cwnd=10 * 1448)
    start.ack(8 * 1448)
    assert start.cc.cwnd == 12 * 1448
    start.cc.ca_state = 4
    start.ack(8 * 1448)
    assert start.cc.cwnd == 13 * 1448


def test_slow_start_ends_exactly_at_the_threshold(stack: CoreStack) -> None:
    h = ByHand(stack, "reno", cwnd=10 * 1448)
    h.cc.ssthresh = 11 * 1448
    h.ack(2 * 1448)
    assert 11 * 1448 <= h.cc.cwnd < 12 * 1448
