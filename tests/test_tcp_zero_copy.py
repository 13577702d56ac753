# SPDX-License-Identifier: Apache-2.0
"""Payload that is not copied: buffers that the stack lends, and buffers that it takes (bypass.h, sock_zc.c)."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from bypass._core import ffi, lib
from tcp_talk import PEER, US, Talk, stream

from bypass.core import Config

MSS = 1460


class Zc(Talk):
    """A conversation whose program uses the calls without copying."""

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        self.keep: list[Any] = []

    def lend(self, pieces: int = 16) -> list[Any]:
        """struct bypass_buf of each piece."""
        out = ffi.new("struct bypass_buf[]", pieces)
        n = lib.bypass_recv_zc(self.stack.c, self.sock, out, pieces)
        assert n >= 0, errno.errorcode[-n]
        self.settle()
        self.keep.append(out)  # its elements do not
        return list(out[0:n]) if n else []

    def lend_error(self, sock: int | None = None, pieces: int = 4) -> int:
        out = ffi.new("struct bypass_buf[]", max(pieces, 1))
        return int(lib.bypass_recv_zc(self.stack.c, self.sock if sock is None else sock, out, pieces))

    def release(self, *tokens: int) -> int:
        done = int(lib.bypass_release(self.stack.c, ffi.new("uint64_t[]", tokens), len(tokens)))
        self.settle()
        return done

    def alloc(self, n: int = 1) -> Any:
        bufs = ffi.new("struct bypass_buf[]", n)
        got = lib.bypass_buf_alloc(self.stack.c, self.sock, bufs, n)
        assert got == n, got
        self.keep.append(bufs)
        return bufs

    def put(self, buf: Any, n: int) -> None:
        """The next n bytes of our stream."""
        ffi.memmove(buf.data, stream(self.wrote, self.wrote + n), n)
        buf.len = n
        self.wrote += n

    def send_zc(self, bufs: Any, flags: int = 0) -> int:
        sent = int(lib.bypass_send_zc(self.stack.c, self.sock, bufs, len(bufs), flags))
        self.settle()
        return sent

    @property
    def lent(self) -> int:
        return self.stack.audit()["lent"]

    @property
    def copied(self) -> int:
        return self.stack.stats()["tcp_copied_bytes"]


def text(b: Any) -> bytes:
    return bytes(ffi.buffer(b.data, b.len))


def conversation(**kw: Any) -> Zc:
    kw.setdefault("rcvbuf", 65535)
    t = Zc(**kw)
    t.established()
    return t


# ---- receiving
def test_what_was_received_is_lent_where_it_lies_and_nothing_is_copied() -> None:
    with conversation() as t:
        t.peer(f". 1:{1 + MSS}", f". {1 + MSS}:{1 + 2 * MSS}")
        bufs = t.lend()
        assert [text(b) for b in bufs] == [stream(1, 1 + MSS), stream(1 + MSS, 1 + 2 * MSS)]
        assert (t.lent, t.held(), t.copied) == (2, 2, 0)
        assert t.lend_error() == -errno.EAGAIN
        assert t.release(*(b.token for b in bufs)) == 0
        assert (t.lent, t.held()) == (0, 0)


def test_as_many_pieces_are_lent_as_were_asked_for_and_the_rest_is_read_as_ever() -> None:
    with conversation() as t:
        t.peer(f". 1:{1 + MSS}", f". {1 + MSS}:{1 + 2 * MSS}", f". {1 + 2 * MSS}:{1 + 3 * MSS}")
        [first] = t.lend(1)
        assert t.read(MSS + 7) == stream(1 + MSS, 1 + 2 * MSS + 7)
        [rest] = t.lend()
        assert text(rest) == stream(1 + 2 * MSS + 7, 1 + 3 * MSS)
        assert text(first) == stream(1, 1 + MSS)
        assert t.release(first.token, rest.token) == 0


def test_a_short_payload_is_lent_from_its_copy_unless_frames_are_to_be_kept() -> None:
    with conversation() as t:
        t.peer("P. 1:101")
        [copy] = t.lend()
        assert (text(copy), t.copied, t.held()) == (stream(1, 101), 100, 0)
        t.option("TCP_KEEP_FRAMES", 1)
        t.peer("P. 101:201")
        [frame] = t.lend()
        assert (text(frame), t.copied, t.held()) == (stream(101, 201), 100, 1)
        assert t.lent == 2
        assert t.release(frame.token, copy.token) == 0
        assert (t.lent, t.stack.audit()["chunks"]) == (0, 0)


@pytest.mark.parametrize("ts", [False, True])
def test_connections_inherit_that_frames_are_to_be_kept(ts: bool) -> None:
    with Zc() as t:
        t.established(ts=ts, opts="mss 1460" + (", ts 1000 0" if ts else ""), TCP_KEEP_FRAMES=1)
        t.peer("P. 1:11")
        [b] = t.lend()
        assert (text(b), t.copied, t.held()) == (stream(1, 11), 0, 1)
        t.release(b.token)


def test_data_that_came_out_of_order_is_lent_in_order() -> None:
    with conversation() as t:
        t.peer(f". {1 + MSS}:{1 + 2 * MSS}", f". 1:{1 + MSS}")
        bufs = t.lend()
        assert b"".join(map(text, bufs)) == stream(1, 1 + 2 * MSS)
        assert t.copied == 0
        t.release(*(b.token for b in bufs))


def test_what_is_lent_counts_against_the_window_until_it_is_released() -> None:
    with conversation(rcvbuf=4 * MSS) as t:
        for i in range(4):
            t.peer(f". {1 + i * MSS}:{1 + (i + 1) * MSS}")
        bufs = t.lend()
        t.out()
        t.advance(1)
        t.peer(f". {1 + 4 * MSS}:{2 + 4 * MSS}")  # a probe of the closed window
        t.hears(f". 1:1 ack {1 + 4 * MSS} win 0")
        t.release(bufs[0].token)
        t.hears()  # one segment is no window to speak of (RFC 9293 3.8.6.2.2)
        t.release(bufs[1].token)
        t.hears(f". 1:1 ack {1 + 4 * MSS} win {2 * MSS}")
        t.release(bufs[2].token, bufs[3].token)
        assert t.info.rcv_queued == 0


def test_a_program_that_never_releases_stops_its_own_connection_only() -> None:
    """The memory is bounded by its receive buffer, the audit shows it, and others go on."""
    with conversation(rcvbuf=8 * MSS, frames=64) as t:
        slow, at, bufs = t.sock, 1, []
        while (room := t.info.rcv_wnd) >= MSS:
            t.peer(f". {at}:{at + MSS}")
            at += MSS
            bufs += t.lend()
            assert room <= 8 * MSS
        assert (t.lent, t.held()) == (8, 8)
        t.out()
        t.peer_port, t.iss, t.heard = 40001, None, 0  # another connection
        t.peer("S 0:0 <mss 1460>")
        t.out()
        t.peer(". 1:1 ack 1")
        fast = t.accept()
        assert fast != slow
        t.peer(f"P. 1:{1 + MSS} ack 1")
        assert t.read() == stream(1, 1 + MSS)
        assert t.release(*(b.token for b in bufs)) == 0


def test_the_end_of_the_stream_is_told_as_by_recv() -> None:
    with conversation() as t:
        t.peer(f"F. 1:{1 + MSS}")
        [b] = t.lend()
        assert t.lend_error() == 0
        t.release(b.token)
        t.close_sock()
        t.peer(f". {2 + MSS}:{2 + MSS} ack 2")


def test_a_reset_is_told_once_and_what_came_before_it_stays_readable() -> None:
    with conversation() as t:
        t.peer(f". 1:{1 + MSS}")
        [b] = t.lend()
        t.peer(f"R {1 + MSS}:{1 + MSS}")
        assert t.lend_error() == -errno.ECONNRESET
        assert t.lend_error() == 0
        assert text(b) == stream(1, 1 + MSS)
        assert t.release(b.token) == 0


def test_the_urgent_byte_is_never_lent_and_the_mark_parts_the_pieces() -> None:
    """tcp_urg.c: a read stops in front of the mark, and the next passes over the byte."""
    with conversation() as t:
        t.option("TCP_KEEP_FRAMES", 1)
        t.peer("P. 1:101", "PU. 101:202 <urg 101>", "P. 202:302")
        [before] = t.lend()
        assert text(before) == stream(1, 101)
        assert t.lend_error() == -errno.EMSGSIZE  # the mark is inside of what comes next
        assert t.read() == stream(101, 201)
        [after] = t.lend()
        assert text(after) == stream(202, 302)
        t.release(before.token, after.token)


# ---- the end
@pytest.mark.parametrize("how", ["close", "abort"])
def test_lent_buffers_outlive_socket_connection_and_whoever_has_its_place(how: str) -> None:
    with conversation(conns=1) as t:
        t.peer(f". 1:{1 + MSS}", f"P. {1 + MSS}:{11 + MSS}")
        bufs = t.lend()
        t.out()
        if how == "close":
            t.close_sock()
            t.hears(f"F. 1:1 ack {11 + MSS}")
            t.peer(f"R {11 + MSS}:{11 + MSS}")
        else:
            t.stack.abort(t.sock)
            t.out()
        assert t.state() == ""
        t.peer_port, t.iss, t.heard = (
            40001,
            None,
            0,
        )  # the only connection that there is room for takes its place
        t.peer("S 0:0 <mss 1460>")
        t.out()
        t.peer(". 1:1 ack 1")
        t.accept()
        assert b"".join(map(text, bufs)) == stream(1, 11 + MSS)
        window = t.info.rcv_wnd
        assert t.release(*(b.token for b in bufs)) == 0
        assert (t.lent, t.held(), t.stack.audit()["chunks"], t.info.rcv_wnd) == (0, 0, 0, window)
        t.peer(f"P. 1:{1 + MSS} ack 1")
        assert t.held() == 1  # in its frame: nothing is charged to the new connection
        assert t.read() == stream(1, 1 + MSS)


def test_buffers_outlive_the_stack_and_the_audit_tells_of_them() -> None:
    t = conversation()
    t.peer(f". 1:{1 + MSS}", f"P. {1 + MSS}:{11 + MSS}")
    bufs = [*t.lend(), *t.alloc()]
    lib.bypass_destroy(t.stack.c)
    audit = t.stack.audit()
    assert {k: v for k, v in audit.items() if v} == {"lent": 3, "frames": 2, "chunks": 1}
    assert text(bufs[0]) == stream(1, 1 + MSS)
    tokens = ffi.new("uint64_t[]", [b.token for b in bufs])
    assert lib.bypass_release(t.stack.c, tokens, 3) == 0
    assert lib.bypass_release(t.stack.c, tokens, 3) == -errno.EINVAL
    t.close()


# ---- sending
def test_a_buffer_is_the_segment_that_leaves_and_nothing_is_copied() -> None:
    with conversation() as t:
        bufs = t.alloc(2)
        assert {b.cap for b in bufs} == {MSS}
        t.put(bufs[0], MSS)
        t.put(bufs[1], 500)
        assert t.send_zc(bufs) == 2
        assert not any(b.token or b.data or b.len for b in bufs)
        t.hears(f". 1:{1 + MSS}")
        t.peer(f". 1:1 ack {1 + MSS}")
        t.hears(f"P. {1 + MSS}:{501 + MSS}")
        assert (t.lent, t.copied) == (0, 0)
        t.peer(f". 1:1 ack {501 + MSS}")
        assert t.held() == 0


def test_small_buffers_are_segments_of_their_own_and_only_the_last_waits_for_nagle() -> None:
    with conversation() as t:
        bufs = t.alloc(3)
        for b in bufs:
            t.put(b, 100)
        assert t.send_zc(bufs) == 3
        t.hears(". 1:101", ". 101:201")
        t.option("TCP_NODELAY", 1)
        t.hears("P. 201:301")
        t.peer(". 1:1 ack 301")


def test_a_lost_buffer_is_sent_again_as_it_was_written() -> None:
    with conversation() as t:
        b = t.alloc()
        t.put(b[0], 700)
        assert t.send_zc(b) == 1
        t.hears("P. 1:701")
        t.at(0.2, "P. 1:701")  # RTO
        t.peer(". 1:1 ack 701")
        assert (t.held(), t.copied) == (0, 0)


def test_a_buffer_longer_than_the_segments_of_now_is_split() -> None:
    """What bypass_buf_alloc() promised holds, also after the path's MTU shrank."""
    with conversation() as t:
        b = t.alloc()
        t.write(1)
        t.icmp(3, 4, 1, mtu=576)
        t.peer(". 1:1 ack 2")
        t.out()
        t.put(b[0], MSS)
        assert t.send_zc(b) == 1
        t.hears(". 2:538", ". 538:1074")
        t.peer(". 1:1 ack 1074")
        t.hears("P. 1074:1462")
        t.peer(". 1:1 ack 1462")


def test_what_the_send_buffer_has_no_room_for_stays_the_programs() -> None:
    with conversation(sndbuf=4096, config={"sndbuf_max": 4096}) as t:
        t.win = 0
        t.peer(". 1:1 win 0")
        bufs = t.alloc(5)
        for b in bufs:
            t.put(b, MSS)
        taken = t.send_zc(bufs)
        assert taken == 3
        assert [bool(b.token) for b in bufs] == [False] * 3 + [True] * 2
        left = bufs[3:5]
        assert (t.lent, t.send_zc(left)) == (2, -errno.EAGAIN)
        t.taken(t.sock)
        t.win = 65535
        t.peer(". 1:1 ack 1")
        t.peer(f". 1:1 ack {1 + 3 * MSS}")
        assert t.taken(t.sock) & lib.BYPASS_OUT
        assert t.send_zc(left) == 2
        t.peer(f". 1:1 ack {1 + 5 * MSS}")
        assert t.lent == 0


def test_buffers_and_copied_bytes_keep_their_order() -> None:
    with conversation() as t:
        t.option("TCP_CORK", 1)
        t.write(10)
        b = t.alloc(2)
        t.put(b[0], 20)
        t.put(b[1], 30)
        assert t.send_zc(b) == 2
        t.write(40)
        t.option("TCP_CORK", 0)
        got = b"".join(s.data for s in t.out())
        t.peer(f". 1:1 ack {1 + len(got)}")
        assert got + b"".join(s.data for s in t.out()) == stream(1, 101)
        t.peer(". 1:1 ack 101")


def test_a_quarter_of_the_frames_may_be_out_for_writing() -> None:
    with conversation(frames=64) as t:
        bufs = ffi.new("struct bypass_buf[]", 64)
        assert lib.bypass_buf_alloc(t.stack.c, t.sock, bufs, 64) == 16
        assert lib.bypass_buf_alloc(t.stack.c, t.sock, bufs + 16, 1) == -errno.ENOBUFS
        t.write(3000)  # others have enough
        assert t.release(bufs[0].token) == 0
        assert lib.bypass_buf_alloc(t.stack.c, t.sock, bufs, 64) == 1
        assert t.release(*(b.token for b in bufs[0:16])) == 0
        t.peer(". 1:1 ack 3001")


# ---- mistakes
def test_what_is_no_connection_says_so() -> None:
    with Zc() as t:
        t.server()
        udp = t.udp(9)
        b = ffi.new("struct bypass_buf[]", 1)
        for sock, why in ((udp, errno.EOPNOTSUPP), (t.listener, errno.ENOTCONN), (12345, errno.EBADF)):
            assert lib.bypass_recv_zc(t.stack.c, sock, b, 1) == -why
            assert lib.bypass_buf_alloc(t.stack.c, sock, b, 1) == -why
            assert lib.bypass_send_zc(t.stack.c, sock, b, 1, 0) == -why


def test_a_connection_that_was_shut_down_takes_no_buffer_and_gives_it_back() -> None:
    with conversation() as t:
        b = t.alloc()
        t.put(b[0], 10)
        t.shutdown()
        assert t.send_zc(b) == -errno.EPIPE
        assert (b[0].len, t.lent) == (10, 1)
        assert t.release(b[0].token) == 0
        t.peer(". 1:1 ack 2")


MISUSE = {
    "released twice": lambda t, r, w: (t.release(r.token), t.release(r.token))[1],
    "released twice in one call": lambda t, r, w: t.release(r.token, r.token),
    "released, then sent": lambda t, r, w: (t.release(w[0].token), t.send_zc(w))[1],
    "sent, then released": lambda t, r, w: t.release(*[w[0].token, t.send_zc(w)][:1]),
    "sent although it was lent for reading": lambda t, r, w: t.send_zc(ffi.new("struct bypass_buf[]", [r])),
    "sent twice in one call": lambda t, r, w: t.send_zc(ffi.new("struct bypass_buf[]", [w[0], w[0]])),
    "good ones before a bad one": lambda t, r, w: t.send_zc(ffi.new("struct bypass_buf[]", [w[0], r])),
    "empty": lambda t, r, w: t.send_zc(ffi.new("struct bypass_buf[]", [{"token": w[0].token}])),
    "too long": lambda t, r, w: t.send_zc(
        ffi.new("struct bypass_buf[]", [{"token": w[0].token, "len": w[0].cap + 1}])
    ),
    "no buffer at all": lambda t, r, w: lib.bypass_send_zc(t.stack.c, t.sock, w, 0, 0),
    "a frame that is not out": lambda t, r, w: t.release(r.token ^ 1),
    "another serial": lambda t, r, w: t.release(r.token + (1 << 32)),
    "a frame that does not exist": lambda t, r, w: t.release(r.token & ~0xFFFFFFFF | 0x7FFFFFFF),
    "a chunk that does not exist": lambda t, r, w: t.release(r.token | 0xFFFFFFFF),
    "a chunk that is not out": lambda t, r, w: t.release((r.token | 0x80000000) ^ 1),
    "nothing": lambda t, r, w: t.release(0),
}


@pytest.mark.parametrize("what", MISUSE)
@pytest.mark.parametrize("chunk", [False, True], ids=["frame", "chunk"])
def test_a_mistake_with_tokens_is_an_error_and_harms_nobody(what: str, chunk: bool) -> None:
    """Everything that is still out works afterwards, and the conversation goes on."""
    with conversation() as t:
        t.option("TCP_NODELAY", 1)
        size = 10 if chunk else MSS
        t.peer(f". 1:{1 + size}")
        [r] = t.lend()
        t.peer(f". {1 + size}:{1 + 2 * size}")  # unread: no token must reach it
        w = t.alloc()
        t.put(w[0], 100)
        written = w[0].token
        assert MISUSE[what](t, r, w) == -errno.EINVAL
        lib.bypass_release(t.stack.c, ffi.new("uint64_t[]", [r.token, written]), 2)
        assert t.lent == 0
        assert t.read() == stream(1 + size, 1 + 2 * size)
        t.wrote = 1 if "sent, then" not in what else 101
        t.write(100)
        t.out()
        t.peer(f". {1 + 2 * size}:{1 + 2 * size} ack {t.wrote}")
        assert t.held() == 0


def test_a_token_of_another_stack_is_none_of_this_one() -> None:
    with conversation(seed=1) as a, conversation(seed=2) as b:
        mine: list[Any] = []
        for t in (a, b):
            t.peer(f". 1:{1 + MSS}")
            mine += t.lend()
        assert a.release(mine[1].token) == -errno.EINVAL
        assert b.release(mine[0].token) == -errno.EINVAL
        assert (a.lent, b.lent) == (1, 1)
        assert (a.release(mine[0].token), b.release(mine[1].token)) == (0, 0)


def test_a_token_from_before_the_stack_was_made_anew_returns_its_frame_and_no_more() -> None:
    """The same arena, the same device: the frame goes back, and the new stack's accounts stay as they are."""
    t = conversation()
    t.peer(f". 1:{1 + MSS}")
    [old] = t.lend()
    lib.bypass_destroy(t.stack.c)
    lib.sim_stack_del(t.sim, t.number)
    arena = t.stack._arena
    ffi.memmove(arena, bytes(len(arena)), len(arena))
    cfg = Config(conns=64, rcvbuf=65535).fill(lib.BYPASS_F_PING | lib.BYPASS_F_RST)
    env = ffi.new("struct bypass_env *")
    assert lib.sim_env(t.sim, env, 1) == 0
    assert lib.bypass_create(t.stack.c, arena, len(arena), cfg, t.port, env, t.now) == 0
    t.stack.addr_add(US, 24)
    t.stack.nexthop_set(PEER, bytes.fromhex("020000000002"))
    t.number = lib.sim_stack_add(t.sim, t.stack.c, t.port)
    t.iss, t.heard = None, 0
    t.established()
    t.peer(f". 1:{1 + MSS}")
    [new] = t.lend()
    assert t.release(old.token) == 0
    assert (t.lent, t.held()) == (1, 1)
    assert text(new) == stream(1, 1 + MSS)
    assert t.release(new.token) == 0
    t.close()


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_calls_loses_no_frame_and_no_byte(seed: int) -> None:
    """A hundred random calls, a third of them mistakes."""
    rnd = random.Random(seed)
    with conversation(frames=128, chunks=64) as t:
        t.option("TCP_NODELAY", 1)
        got, dead, out = b"", [0, 1, 1 << 63], []
        for _ in range(200):
            match rnd.randrange(8):
                case 0 | 1:
                    n = rnd.choice([1, 100, 300, MSS])
                    if t.info.rcv_wnd >= n:
                        t.peer(f"P. {t.nxt}:{t.nxt + n}")
                case 2:
                    bufs = t.lend(rnd.randint(1, 3)) if t.info.rcv_queued else []
                    got += b"".join(map(text, bufs))
                    out += [b.token for b in bufs]
                case 3 if out:
                    token = out.pop(rnd.randrange(len(out)))
                    assert t.release(token) == 0
                    dead.append(token)
                case 4:
                    wrong = rnd.choice(dead) ^ rnd.choice([0, 0, 1 << 33])
                    if wrong not in out:
                        assert t.release(wrong) == -errno.EINVAL
                case 5:
                    b = t.alloc()
                    token = b[0].token
                    t.put(b[0], rnd.randint(1, b[0].cap))
                    assert t.send_zc(b) == 1
                    dead.append(token)
                case 6:
                    t.write(rnd.randint(1, 3000))
                case 7:
                    data = t.read(rnd.randint(1, 2000))
                    got += data if isinstance(data, bytes) else b""
            t.out()
            t.peer(f". {t.nxt}:{t.nxt}")
            t.out()
        assert got == stream(1, 1 + len(got))
        assert t.lent == len(out)
        assert not out or t.release(*out) == 0
        while isinstance(data := t.read(), bytes) and data:
            got += data
        assert got == stream(1, t.nxt)
