# SPDX-License-Identifier: Apache-2.0
"""TCP: buffers that grow as peer, path and program can use them, and what happens when memory is short."""

from __future__ import annotations

import contextlib
import errno

import pytest
from bypass._core import lib
from tcp_talk import PEER_PORT, Talk, stream

from bypass.core import Config
from bypass.sim import Faults, Network

WS = "mss 1460, nop, ws 7"
TS = "mss 1460, nop, nop, ts 1000 0, nop, ws 7"
AGAIN = -errno.EAGAIN
MIB = 1 << 20


def bulk(t: Talk, rounds: int, rtt: float, *, reads: bool = True, most: int = 1 << 19) -> list[int]:
    """A peer that fills the window it was offered each round trip; windows offered after each, in bytes."""
    sent, windows = 1, []
    for _ in range(rounds):
        last = t.out()
        if last:
            assert last[-1].ack is not None
        edge = (t.info.rcv_nxt - t.peer_iss) % 2**32 + t.info.rcv_wnd
        end = min(edge, sent + most)
        while sent + 1448 <= end:
            t.peer(f". {sent}:{sent + 1448}")
            sent += 1448
            if reads:
                t.read()
        windows.append(t.info.rcv_wnd)
        t.advance(rtt)
    t.out()
    return windows


def small(**kw: object) -> Talk:
    """Initial buffers of 32 KiB that may grow to 2 MiB."""
    return Talk(
        rcvbuf=32768, sndbuf=32768, config={"sndbuf_max": 2 * MIB, "rcvbuf_max": 2 * MIB}, frames=4096, **kw
    )  # type: ignore[arg-type]


# ---- Receiving --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("opts", "ts"), [(TS, True), (WS, False)], ids=["timestamps", "window per round trip"]
)
def test_the_window_grows_while_a_bulk_sender_fills_it(opts: str, ts: bool) -> None:
    """Both ways of seeing a round trip from the receiving side."""
    with small() as t:
        t.established(opts=opts, ts=ts)
        windows = bulk(t, 12, 0.05)
        assert windows[0] <= 32768
        assert windows[-1] >= 500_000, windows
        assert t.counted()["tcp_tune_rcvbuf"] >= 3


def test_the_window_stays_while_the_program_does_not_read() -> None:
    with small() as t:
        t.established(opts=TS, ts=True)
        bulk(t, 8, 0.05, reads=False)
        assert t.info.rcv_queued <= 32768
        assert "tcp_tune_rcvbuf" not in t.counted()


def test_the_window_stays_when_the_peer_sends_little() -> None:
    """What is read in a round trip is what counts, not how long the connection lives."""
    with small() as t:
        t.established(opts=TS, ts=True)
        bulk(t, 40, 0.05, most=10_000)
        assert "tcp_tune_rcvbuf" not in t.counted()
        assert t.info.rcv_wnd <= 32768


def test_a_size_that_the_program_chose_is_kept() -> None:
    with small() as t:
        t.established(opts=TS, ts=True, SO_RCVBUF=65536)
        windows = bulk(t, 8, 0.05)
        assert max(windows) <= 65536
        assert t.stack.getopt(t.sock, lib.BYPASS_SO_RCVBUF) == 65536


def test_the_window_grows_to_the_maximum_and_no_further() -> None:
    with Talk(rcvbuf=32768, config={"rcvbuf_max": 100_000}, frames=4096) as t:
        t.established(opts=TS, ts=True)
        assert max(bulk(t, 12, 0.05)) <= 100_000
        assert t.stack.getopt(t.sock, lib.BYPASS_SO_RCVBUF) == 100_000


@pytest.mark.parametrize(("most", "shift"), [(32768, 0), (65535, 0), (65536, 1), (6 * MIB, 7), (1 << 30, 14)])
def test_the_window_scale_follows_from_the_maximum(most: int, shift: int) -> None:
    """RFC 7323 2.3: it cannot change later, so it has to serve the largest buffer; 14 at most."""
    for passive in (True, False):
        with Talk(rcvbuf=32768, config={"rcvbuf_max": most}) as t:
            if passive:
                t.server()
                t.peer(f"S 0:0 <{WS}>")
            else:
                t.client()
            [syn] = t.out()
            assert syn.opts["ws"] == shift
            assert syn.win == 32768


def test_a_program_that_asks_for_a_gigabyte_gets_the_scale_for_it() -> None:
    with Talk() as t:
        t.client(SO_RCVBUF=1 << 30)
        [syn] = t.out()
        assert (syn.opts["ws"], syn.win) == (14, 65535)


# ---- A gigabyte -------------------------------------------------------------------------------------------------
GIB_WINDOW = 65535 << 14  # the largest that the header can say (RFC 7323 2.2)


def test_a_gigabyte_is_offered_and_taken_from_end_to_end() -> None:
    """RFC 7323 2.3: data at the far end of the window is new, behind it is cut off, and before it is old."""
    with Talk(config={"rcvbuf_max": 1 << 30}) as t:
        t.established(opts="mss 1460, sackok, nop, ws 14", SO_RCVBUF=1 << 30)
        t.peer("P. 1:101")
        t.advance(0.05)
        t.hears(". 1:1 ack 101 win 65535")
        edge = 101 + GIB_WINDOW
        t.inject_ip(t.segment(f". {edge - 50}:{edge + 50}", data=bytes(100)))
        [ack] = t.out()
        assert ack.opts["sack"] == (f"{edge - 50}:{edge}",)
        t.inject_ip(t.segment(f". {edge}:{edge + 10}", data=bytes(10)))
        assert t.counted()["tcp_in_out_of_window"] == 1
        t.inject_ip(t.segment(f". {101 - GIB_WINDOW}:{151 - GIB_WINDOW}", data=bytes(50)))
        assert t.counted()["tcp_in_duplicate"] == 1
        t.out()
        assert t.read() == stream(1, 101)
        assert t.info.rcv_queued == 0


def test_a_peers_gigabyte_is_understood() -> None:
    with Talk(cc="reno") as t:
        t.established(opts="mss 1460, nop, ws 14")
        assert t.info.snd_wnd == GIB_WINDOW
        t.write(20_000)  # the congestion window is the limit
        assert (t.info.snd_nxt - t.info.snd_una) % 2**32 == 14_600
        t.out()
        t.peer(". 1:1 ack 14601 win 1")
        assert t.info.snd_wnd == 1 << 14


@pytest.mark.parametrize("tuned", [False, True], ids=["set", "tuned"])
def test_half_a_second_of_path_is_filled(tuned: bool) -> None:
    """A window beyond 2^25 bytes in use, with the largest shift; buffers set to a gigabyte, and grown towards it as far
    as half of the frames allow."""
    sizes = {"sndbuf_max": 1 << 30, "rcvbuf_max": 1 << 30} | (
        {} if tuned else {"sndbuf": 1 << 30, "rcvbuf": 1 << 30}
    )
    port = {"frames": 131072 if tuned else 65536, "in_flight": 65536, "tx_ring": 65536}
    with Network(seed=1) as net:
        net.wire(faults=Faults(delay_ns=250_000_000))
        server, client = (
            net.stack(ip, config=Config(conns=8, **sizes), **port) for ip in ("10.0.0.2", "10.0.0.1")
        )
        listener = server.create_server(("10.0.0.2", 80))
        a = client.create_connection(("10.0.0.2", 80))
        b, _ = listener.accept()
        for s in (a, b):
            s.setblocking(False)
        total, at, got, target, flight = 150 * MIB, 0, 0, bytearray(MIB), 0
        block = bytes(range(256)) * (MIB // 256)
        while got < total:
            with contextlib.suppress(BlockingIOError):
                while at < total:
                    at += a.send(block[at % 256 : min(MIB, at % 256 + total - at)])
            with contextlib.suppress(BlockingIOError):
                while n := b.recv_into(target):
                    assert target[0] == got % 256
                    assert target[n - 1] == (got + n - 1) % 256
                    got += n
            [info] = client.conns()
            flight = max(flight, (info.snd_nxt - info.snd_una) % 2**32)
            client.run(timeout=0.05)
        assert flight > 1 << 25
        assert info.retransmits == 0
        for s in (a, b, listener):
            s.close()


# ---- Sending ----------------------------------------------------------------------------------------------------
def test_the_send_buffer_follows_the_congestion_window() -> None:
    with small() as t:
        t.established(opts=TS, ts=True)
        t.win = 65535
        for _ in range(6):
            while t.stack.send(t.sock, stream(t.wrote, t.wrote + 60_000)) > 0:
                t.wrote = 1 + (t.info.snd_una - t.iss) % 2**32 - 1 + t.info.snd_queued
            t.settle()
            t.out()
            t.advance(0.05)
            t.peer(f". 1:1 ack {t.heard}")
        assert t.stack.getopt(t.sock, lib.BYPASS_SO_SNDBUF) > 100_000
        assert t.stack.getopt(t.sock, lib.BYPASS_SO_SNDBUF) <= 2 * MIB


def test_a_send_buffer_that_the_program_chose_is_kept() -> None:
    with small() as t:
        t.established(opts=TS, ts=True, SO_SNDBUF=20_000)
        for _ in range(6):
            while t.stack.send(t.sock, stream(t.wrote, t.wrote + 60_000)) > 0:
                t.wrote = 1 + (t.info.snd_una - t.iss) % 2**32 - 1 + t.info.snd_queued
            t.settle()
            t.out()
            t.advance(0.05)
            t.peer(f". 1:1 ack {t.heard}")
        assert t.stack.getopt(t.sock, lib.BYPASS_SO_SNDBUF) == 20_000
        assert t.info.snd_queued <= 20_000 + 1448


# ---- Memory -----------------------------------------------------------------------------------------------------
def test_buffers_stop_growing_when_half_of_the_frames_are_used() -> None:
    with Talk(rcvbuf=32768, config={"rcvbuf_max": 2 * MIB}, frames=512) as t:
        t.established(opts=WS)
        t.option("SO_RCVBUF", MIB)
        for first in range(1, 280_000, 1000):
            t.peer(f". {first}:{first + 1000}")
        assert t.held() >= 256
        t.out()
        t.peer_port, t.iss = PEER_PORT + 1, None
        t.peer(f"S 0:0 <{WS}>")
        t.out()
        t.peer(". 1:1")
        t.accept()
        bulk(t, 10, 0.05)
        assert t.stack.getopt(t.sock, lib.BYPASS_SO_RCVBUF) == 32768
        assert t.counted()["tcp_tune_held_back"] >= 1


def fill_memory(t: Talk) -> int:
    """A connection whose reader sleeps takes frames and chunks until they are short. Its handle."""
    t.established()
    sock, first = t.sock, 1
    while t.stack.stats()["tcp_in_no_memory"] == 0 and t.info.rcv_wnd >= 1000:
        t.peer(f". {first}:{first + 1000}")
        first += 1000
    t.out()
    return sock


def test_under_pressure_new_connections_are_refused_and_old_ones_go_on() -> None:
    """What lives makes progress: its window opens by a few segments as its program reads."""
    with Talk(rcvbuf=MIB, frames=64, chunks=64) as t:
        full = fill_memory(t)
        t.counted()
        t.peer_port, t.iss = PEER_PORT + 1, None
        t.peer("S 0:0 <mss 1460>")
        assert t.out() == []
        assert t.counted()["tcp_syn_pressure"] == 1
        t.peer_port = PEER_PORT
        held = t.info.rcv_queued
        while isinstance(got := t.stack.recv(full, 4096), bytes):
            held -= len(got)
        assert held == -1000, "the segment that was refused is not lost"
        t.sent()
        t.peer_port, t.iss = PEER_PORT + 1, None
        t.peer("S 0:0 <mss 1460>")
        assert [s.flags for s in t.out()] == ["S."]


def some(t: Talk, n: int) -> list[tuple[int, int, int | None]]:
    """Connections: the handle of each, its peer's port, and our first sequence number in it."""
    t.established(opts=WS)
    peers = [(t.sock, t.peer_port, t.iss)]
    for port in range(PEER_PORT + 1, PEER_PORT + n):
        t.peer_port, t.iss = port, None
        t.peer("S 0:0 <mss 1460>")
        t.out()
        t.peer(". 1:1")
        peers.append((t.accept(), port, t.iss))
    return peers


@pytest.mark.parametrize("chunks", [64, 4], ids=["chunks", "frames alone"])
def test_connections_that_are_not_read_leave_memory_for_one_that_is(chunks: int) -> None:
    """A program reads one connection to its end, and then the next: what waits on the others must not stop that one."""
    with Talk(rcvbuf=MIB, frames=64, chunks=chunks) as t:
        peers = some(t, 4)
        for _, t.peer_port, t.iss in reversed(peers):  # so that there is nothing for the first
            for first in range(1, 40_001, 1000):
                t.peer(f". {first}:{first + 1000}")
        assert t.counted()["tcp_in_no_memory"] > 0
        for t.sock, t.peer_port, t.iss in peers:
            got = b""
            for _ in range(60):
                if isinstance(more := t.stack.recv(t.sock, 4096), bytes):
                    got += more
                first = 1 + len(got) + t.info.rcv_queued
                t.peer(f". {first}:{first + 1000}")
            assert len(got) >= 50_000
            assert got == stream(1, len(got) + 1)
        t.sent()


def test_a_peer_whose_segment_was_refused_hears_at_once_when_the_program_reads() -> None:
    """It would send it again after a timeout alone, which doubles while nobody reads."""
    with Talk(rcvbuf=MIB, frames=64, chunks=64) as t:
        fill_memory(t)
        held = 1 + t.info.rcv_queued
        t.peer(
            f". {held + 2000}:{held + 3000}", f". {held}:{held + 1000}"
        )  # again, and ahead: nothing is acknowledged
        assert {s.ack for s in t.out()} == {held}
        got = t.read(1 << 20)
        assert t.out()[-1].ack == held + 1000
        assert got + t.read() == stream(1, held + 1000)


def test_a_segment_that_was_refused_and_came_again_is_there_once() -> None:
    with Talk(rcvbuf=MIB, frames=64, chunks=64) as t:
        peers = some(t, 2)
        for t.sock, t.peer_port, t.iss in peers:
            for first in range(1, 60_001, 1000):
                t.peer(f". {first}:{first + 1000}")
        assert t.counted()["tcp_in_no_memory"] > 0
        _, t.peer_port, t.iss = peers[0]
        held = 1 + t.info.rcv_queued
        other = peers[1][0]
        while isinstance(t.stack.recv(other, 4096), bytes):  # so there is memory for the first as well
            pass
        t.peer(f"F. {held}:{held + 1500}")
        got, sock = b"", peers[0][0]
        while isinstance(more := t.stack.recv(sock, 4096), bytes) and more:
            got += more
        assert more == b"", "its end has come"
        assert got == stream(1, held + 1500)
        t.sent()


def test_a_segment_that_was_refused_ends_with_its_connection() -> None:
    with Talk(rcvbuf=MIB, frames=64, chunks=64) as t:
        fill_memory(t)
        t.close_sock()
        t.sent()
        assert (t.stack.audit()["frames"], t.stack.audit()["chunks"]) == (0, 0)


def test_who_is_not_read_leaves_chunks_for_others() -> None:
    with Talk(rcvbuf=MIB, frames=64, chunks=64) as t:
        fill_memory(t)
        assert 48 <= t.stack.audit()["chunks"] < 64


def test_under_pressure_a_window_is_not_taken_back_but_opens_by_a_few_segments() -> None:
    """RFC 9293 3.8.6: the right edge never moves left."""
    with Talk(rcvbuf=200_000, frames=64, chunks=64) as t:
        t.established(opts=WS)
        edge, first = 0, 1
        while t.stack.stats()["tcp_in_no_memory"] == 0:
            t.peer(f". {first}:{first + 1000}")
            first += 1000
            for s in t.out():
                assert s.ack is not None
                assert s.ack + s.win * 4 >= edge - 4
                edge = max(edge, s.ack + s.win * 4)
        assert edge <= 200_001 + 16
        t.advance(0.1)
        t.out()


def test_data_out_of_order_of_any_connection_makes_room_for_data_in_order() -> None:
    with Talk(chunks=32, frames=64) as t:
        t.established()
        for first in range(1001, 1049, 2):
            t.peer(f". {first}:{first + 1}")
        t.out()
        assert t.stack.audit()["chunks"] == 24
        t.peer_port, t.iss = PEER_PORT + 1, None
        t.peer("S 0:0")
        t.out()
        t.peer(". 1:1", *(f". {first}:{first + 200}" for first in range(1, 6001, 200)))
        other = t.accept()
        t.out()
        assert t.counted()["tcp_ooo_pruned"] >= 1
        assert t.stack.recv(other, 6000) == stream(1, 6001)


def test_small_segments_stay_in_their_frames_when_no_chunk_is_left() -> None:
    with Talk(chunks=4, frames=256) as t:
        t.established()
        for first in range(1, 4001, 200):
            t.peer(f". {first}:{first + 200}")
        assert t.read() == stream(1, 4001)
        assert "tcp_in_no_memory" not in t.counted()


# ---- Configuration ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "bad",
    [
        {"rcvbuf_max": 4096},
        {"sndbuf_max": (1 << 30) + 1},
        {"delack_ms": 0},
        {"delack_ms": 501},
    ],
)
def test_sizes_that_make_no_sense_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        Talk(iss=None, config=bad)
