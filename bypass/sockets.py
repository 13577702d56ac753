# SPDX-License-Identifier: Apache-2.0
"""Blocking sockets on a bypass stack, shaped like socket.socket.

A program written for `socket` finds the same methods, results and errors here. What differs:

* There is no file descriptor: fileno() is -1, and select() or selectors cannot wait for these sockets. Use timeouts,
  setblocking(False), or bypass.aio.
* Addresses are IP addresses; names are not resolved.
* On a simulated wire timeouts are of the virtual clock, and a call that blocks runs it.

Threads may share a stack and its sockets: one lock a stack guards them, released while a call waits.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import socket as _socket
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bypass import sockopt
from bypass._core import lib
from bypass.core import FOREVER, Address
from bypass.stack_api import KINDS, Stack
from bypass.zerocopy import PIECES, Received, SendBuffer

__all__ = ["Socket", "create_connection", "create_server"]

T = TypeVar("T")

RECV_FLAGS: dict[int, int] = {_socket.MSG_PEEK: lib.BYPASS_PEEK, _socket.MSG_TRUNC: lib.BYPASS_TRUNC}
SEND_FLAGS: dict[int, int] = {_socket.MSG_MORE: lib.BYPASS_MORE, _socket.MSG_NOSIGNAL: 0}
OOB_FLAGS: dict[int, int] = {_socket.MSG_OOB: lib.BYPASS_OOB}  # of streams
DONTWAIT, WAITALL, FASTOPEN = _socket.MSG_DONTWAIT, _socket.MSG_WAITALL, _socket.MSG_FASTOPEN
AT_ONCE = DONTWAIT | _socket.MSG_OOB  # an urgent byte is there or not: nobody waits for it

SOL, TCP = _socket.SOL_SOCKET, _socket.IPPROTO_TCP
SENDFILE_BYTES = 1 << 18
POLL_BITS: dict[int, int] = {
    lib.BYPASS_IN: select.POLLIN,
    lib.BYPASS_PRI: select.POLLPRI,
    lib.BYPASS_OUT: select.POLLOUT,
    lib.BYPASS_ERR: select.POLLERR,
    lib.BYPASS_HUP: select.POLLHUP,
    lib.BYPASS_RDHUP: select.POLLRDHUP,
    lib.BYPASS_PRI: select.POLLPRI,
}
# States in which the peer has not acknowledged all that was sent, the end included.
LINGERING = frozenset({"FIN_WAIT_1", "CLOSING", "LAST_ACK"})


def raised(code: int) -> OSError:
    """The exception for an errno."""
    return OSError(code, os.strerror(code))


def _translate(flags: int, table: dict[int, int]) -> int:
    result = 0
    for theirs, ours in table.items():
        if flags & theirs:
            result |= ours
            flags &= ~theirs
    if flags:
        raise raised(errno.EOPNOTSUPP)
    return result


class Socket:
    """A socket of a stack: SOCK_STREAM (TCP) or SOCK_DGRAM (UDP), with the methods of socket.socket.

    Raises:
        OSError: as socket.socket does; DeviceGoneError (ENODEV) when the interface was deleted.
        PermissionError: no rule of the policy grants the flow; the message names the flow and the rule that would.
        TimeoutError: after settimeout().
    """

    family = _socket.AF_INET

    def __init__(self, stack: Stack, type: int = _socket.SOCK_STREAM, *, handle: int | None = None) -> None:
        self._handle = -1
        self._stack = stack
        self._lock = stack.driver.lock
        self._timeout: float | None = None
        self._io_timeouts: dict[int, float | None] = {}  # SO_RCVTIMEO, SO_SNDTIMEO
        self._lowat = 1  # SO_RCVLOWAT
        self._io_refs = 0
        self._close_wanted = False
        if type not in KINDS:
            raise raised(errno.ESOCKTNOSUPPORT)
        self.type = _socket.SocketKind(type)
        self.proto = TCP if type == _socket.SOCK_STREAM else _socket.IPPROTO_UDP
        if handle is None:
            with self._lock:
                handle = stack.open(KINDS[type])
        self._handle = handle

    # ---- waiting
    def _h(self) -> int:
        """The handle; EBADF when the socket or its stack is closed."""
        if self._handle < 0 or self._stack.core.closed:
            raise raised(errno.EBADF)
        return self._handle

    def _until(
        self,
        attempt: Callable[[int], T | None],
        *,
        nonblocking: bool = False,
        option: int = _socket.SO_RCVTIMEO,
    ) -> T:
        """Lock held. attempt(handle) until it has a result; None means that it would block. option: whose limit
        holds where settimeout() sets none."""
        deadline: int | None = None
        while (result := attempt(self._h())) is None:
            self._stack.lent.drain()  # buffers that were forgotten may be what the peer waits for
            if nonblocking or self._timeout == 0:
                raise raised(errno.EAGAIN)
            driver = self._stack.driver
            limit = self._timeout if self._timeout is not None else self._io_timeouts.get(option)
            if deadline is None:
                deadline = FOREVER if limit is None else driver.now_ns() + round(limit * 1e9)
            if not driver.wait(deadline):
                # What came at the last moment counts.
                result = attempt(self._h())
                if result is None and self._timeout is None:
                    raise raised(errno.EAGAIN)
                if result is None:
                    raise TimeoutError("timed out")
                break
        return result

    @staticmethod
    def _done(result: Any) -> Any:
        """A result of the core: None for -EAGAIN, OSError for another -errno."""
        if isinstance(result, int) and result < 0:
            if result == -errno.EAGAIN:
                return None
            raise raised(-result)
        return result

    # ---- addresses and connections
    def bind(self, address: Address) -> None:
        with self._lock:
            self._stack.bind(self._h(), address)

    def listen(self, backlog: int = 128) -> None:
        with self._lock:
            self._stack.listen(self._h(), max(backlog, 0))

    def accept(self) -> tuple[Socket, Address]:
        """A connection and its peer. The new socket blocks, whatever the timeout of this one."""
        with self._lock:
            handle = self._until(lambda h: self._done(self._stack.accept(h)))
            peer = self._stack.core.tcp_info(
                handle
            ).peer  # it may have ended already: then peer() says ENOTCONN
        accepted = Socket(self._stack, _socket.SOCK_STREAM, handle=handle)
        accepted._lowat = self._lowat
        accepted._io_timeouts = dict(self._io_timeouts)
        return accepted, peer

    def connect(self, address: Address) -> None:
        """Blocks until the connection is established (TCP) or the peer is set (UDP)."""
        with self._lock:
            result = self._stack.connect(self._h(), address)
            if result == -errno.EINPROGRESS and self._timeout != 0:
                result = self._until(lambda h: self._connected(h, address), option=_socket.SO_SNDTIMEO)
        if result < 0:
            raise raised(-result)

    def _connected(self, handle: int, address: Address) -> int | None:
        result = self._stack.connect(handle, address)
        return None if result == -errno.EALREADY else result

    def connect_ex(self, address: Address) -> int:
        """As connect(), but returns the errno."""
        try:
            self.connect(address)
        except TimeoutError as e:
            return e.errno or errno.EAGAIN
        except PermissionError:
            raise
        except OSError as e:
            if e.errno is None:
                raise
            return e.errno
        return 0

    def getsockname(self) -> Address:
        with self._lock:
            return self._stack.core.local(self._h())

    def getpeername(self) -> Address:
        with self._lock:
            return self._stack.core.peer(self._h())

    # ---- data
    def send(self, data: Any, flags: int = 0) -> int:
        """Bytes taken, at least one: the rest has to be sent again. UDP: one datagram."""
        table = SEND_FLAGS if self.type == _socket.SOCK_DGRAM else SEND_FLAGS | OOB_FLAGS
        ours = _translate(flags & ~DONTWAIT, table)
        with self._lock:
            return self._send(data, ours, bool(flags & DONTWAIT))

    def _send(self, data: Any, ours: int, nonblocking: bool) -> int:
        stack = self._stack
        if self.type == _socket.SOCK_DGRAM:
            sent: int = self._until(
                lambda h: self._done(stack.sendto(h, data, None, ours)),
                nonblocking=nonblocking,
                option=_socket.SO_SNDTIMEO,
            )
        else:
            sent = self._until(
                lambda h: self._done(stack.core.send(h, data, ours)),
                nonblocking=nonblocking,
                option=_socket.SO_SNDTIMEO,
            )
            stack.touched()
        return sent

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Sends everything. After an error nobody knows how much was sent."""
        ours = _translate(flags & ~DONTWAIT, SEND_FLAGS)
        with memoryview(data) as view, view.cast("B") as rest:
            at = 0
            while at < len(rest):
                with self._lock, rest[at:] as part:
                    at += self._send(part, ours, bool(flags & DONTWAIT))

    def sendto(self, data: Any, *args: Any) -> int:
        """sendto(data, address) or sendto(data, flags, address): one datagram."""
        flags, address = (0, args[0]) if len(args) == 1 else args
        if self.type == _socket.SOCK_STREAM and flags & FASTOPEN:
            return self._fast_open(data, flags & ~FASTOPEN, address)
        if self.type == _socket.SOCK_STREAM:
            return self.send(data, flags)
        ours = _translate(flags & ~DONTWAIT, SEND_FLAGS)
        with self._lock:
            sent: int = self._until(
                lambda h: self._done(self._stack.sendto(h, data, address, ours)),
                nonblocking=bool(flags & DONTWAIT),
                option=_socket.SO_SNDTIMEO,
            )
            return sent

    def _fast_open(self, data: Any, flags: int, address: Address) -> int:
        """sendto() with MSG_FASTOPEN (RFC 7413): connects, with data in the SYN where the peer's cookie is known."""
        ours = _translate(flags & ~DONTWAIT, SEND_FLAGS)
        with memoryview(data) as view, view.cast("B") as rest, self._lock:
            sent = self._stack.fastopen(self._h(), rest, address)
            if self._timeout != 0 and not flags & DONTWAIT and (sent >= 0 or sent == -errno.EINPROGRESS):
                failed = self._until(lambda h: self._connected(h, address), option=_socket.SO_SNDTIMEO)
                if failed < 0:
                    raise raised(-failed)
                sent = max(sent, 0)
                if sent < len(rest):
                    with rest[sent:] as part:
                        sent += self._send(part, ours, False)
            if sent < 0:
                raise raised(-sent)
            return sent

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """At most bufsize bytes; b"" when the peer has closed its direction. MSG_PEEK, MSG_WAITALL, MSG_DONTWAIT."""
        if self.type == _socket.SOCK_DGRAM:
            return self.recvfrom(bufsize, flags)[0]
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")
        return self._recv(bufsize, flags) if bufsize else b""  # socket.recv(0) asks nobody

    def _recv(self, bufsize: int, flags: int) -> bytes:
        if flags & WAITALL and bufsize and not flags & _socket.MSG_PEEK:
            buffer = bytearray(bufsize)
            return bytes(buffer[: self.recv_into(buffer, 0, flags)])
        ours = _translate(flags & ~(DONTWAIT | WAITALL), RECV_FLAGS | OOB_FLAGS)
        with self._lock:
            core = self._stack.core
            data: bytes = self._until(
                lambda h: (
                    self._done(core.recv(h, bufsize, ours)) if self._enough(h, bufsize, flags) else None
                ),
                nonblocking=bool(flags & AT_ONCE),
            )
            self._stack.touched()  # room in the receive window may have to be announced
            return data

    def _enough(self, handle: int, n: int, flags: int) -> bool:
        """Lock held. A call that may block waits for the low-water mark (SO_RCVLOWAT); others take what is there."""
        if self._lowat <= 1 or flags & DONTWAIT or self._timeout == 0:
            return True
        core = self._stack.core
        return bool(core.ready(handle) & ~lib.BYPASS_OUT) or core.tcp_info(handle).rcv_queued >= n

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Bytes written to buffer; 0 when the peer has closed its direction."""
        with memoryview(buffer) as view, view.cast("B")[: nbytes or None] as target:
            if self.type == _socket.SOCK_DGRAM:
                data = self.recvfrom(len(target), flags)[0]
                target[: len(data)] = data
                return len(data)
            if not target:
                return 0
            at = 0
            while True:
                try:
                    with target[at:] as part:
                        n = self._recv_part(part, flags, more=at > 0)
                except OSError:
                    if at == 0:
                        raise
                    return at  # what was read counts
                at += n
                if not flags & WAITALL or flags & _socket.MSG_PEEK or n == 0 or at == len(target):
                    return at
                if self.at_mark():
                    return at  # what has read something ends at the urgent mark

    def _recv_part(self, target: memoryview, flags: int, *, more: bool) -> int:
        """more: something was read already, so that an error is left to the next call."""
        ours = _translate(flags & ~(DONTWAIT | WAITALL), RECV_FLAGS | OOB_FLAGS)

        def attempt(h: int) -> int | None:
            core = self._stack.core
            if more and core.ready(h) & lib.BYPASS_ERR and not core.tcp_info(h).rcv_queued:
                return 0
            if not self._enough(h, len(target), flags):
                return None
            got: int | None = self._done(core.recv_into(h, target, ours))
            return got

        with self._lock:
            n = self._until(attempt, nonblocking=bool(flags & AT_ONCE))
            self._stack.touched()
            return n

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, Address | None]:
        """A datagram and its sender. TCP: (data, None)."""
        if self.type == _socket.SOCK_STREAM:
            return self.recv(bufsize, flags), None
        data, sender, _ = self._recvfrom(bufsize, flags)
        return data, sender

    def _recvfrom(self, bufsize: int, flags: int) -> tuple[bytes, Address | None, int]:
        """A datagram, its sender, and with MSG_TRUNC its size before it was cut."""
        ours = _translate(flags & ~(DONTWAIT | WAITALL), RECV_FLAGS)
        with self._lock:
            core, waits = self._stack.core, self._timeout is None and not flags & DONTWAIT

            def attempt(h: int) -> tuple[bytes, Address | None, int] | None:
                got: tuple[bytes, Address, int] | None = self._done(core.recvfrom(h, bufsize, ours))
                if got is None and waits and core.ready(h) & lib.BYPASS_RDHUP:
                    return b"", None, 0  # who would wait after shutdown(SHUT_RD) gets nothing from nobody
                return got

            return self._until(attempt, nonblocking=bool(flags & DONTWAIT))

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Address | None]:
        if self.type == _socket.SOCK_STREAM:
            return self.recv_into(buffer, nbytes, flags), None
        with memoryview(buffer) as view, view.cast("B")[: nbytes or None] as target:
            data, sender = self.recvfrom(len(target), flags)
            target[: len(data)] = data
            return len(data), sender

    # ---- several buffers
    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Address | None = None) -> int:
        """The buffers one after another; UDP: as one datagram. Ancillary data is refused (EINVAL): there is none."""
        if list(ancdata):
            raise raised(errno.EINVAL)
        data = b"".join(bytes(memoryview(b).cast("B")) for b in buffers)
        return self.send(data, flags) if address is None else self.sendto(data, flags, address)

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, Address | None]:
        """(data, [], flags, sender): ancillary data never comes. MSG_TRUNC in flags: the datagram was longer."""
        if self.type == _socket.SOCK_STREAM:
            return self._recv(bufsize, flags), [], 0, None
        data, sender, size = self._recvfrom(bufsize, flags | _socket.MSG_TRUNC)
        return data, [], _socket.MSG_TRUNC if size > len(data) else 0, sender

    def recvmsg_into(
        self, buffers: Any, ancbufsize: int = 0, flags: int = 0
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Address | None]:
        """As recvmsg(), into the buffers one after another."""
        views = [memoryview(b).cast("B") for b in buffers]
        data, anc, shown, sender = self.recvmsg(sum(len(v) for v in views), ancbufsize, flags)
        at = 0
        for view in views:
            part = data[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        return len(data), anc, shown, sender

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Sends a file opened in binary mode from offset on, count bytes or all; the number of bytes sent. The file's
        position is behind them, also when it fails."""
        if self.type != _socket.SOCK_STREAM:
            raise ValueError("only SOCK_STREAM type sockets are supported")
        if self._timeout == 0:
            raise ValueError("non-blocking sockets are not supported")
        if count is not None and count <= 0:
            raise ValueError(f"count must be a positive integer (got {count!r})")
        if offset:
            file.seek(offset)
        sent = 0
        try:
            while count is None or sent < count:
                piece = memoryview(
                    file.read(SENDFILE_BYTES if count is None else min(SENDFILE_BYTES, count - sent))
                )
                if not piece:
                    break
                while piece:
                    n = self.send(piece)
                    sent += n
                    piece = piece[n:]
            return sent
        finally:
            if sent and hasattr(file, "seek"):
                file.seek(offset + sent)

    # ---- readiness
    def readiness(self) -> int:
        """What poll(2) would report now, as a mask of select.POLLIN, POLLOUT, POLLPRI, POLLERR, POLLHUP, POLLRDHUP."""
        with self._lock:
            ready = self._stack.core.ready(self._h())
        return sum(bit for ours, bit in POLL_BITS.items() if ready & ours)

    def at_mark(self) -> bool:
        """What is read next is the urgent byte, or lies behind it (SIOCATMARK). EINVAL: not a connection."""
        with self._lock:
            return self._stack.core.at_mark(self._h())

    # ---- data that is not copied (bypass.zerocopy)
    def recv_zc(self, pieces: int = PIECES, flags: int = 0) -> Received:
        """Lends what was received, in up to `pieces` pieces, until it is released: `with sock.recv_zc() as got:`. Empty
        when the peer has closed its direction. TCP only. MSG_DONTWAIT.

        Raises:
            OSError: as recv(); EMSGSIZE: the mark of urgent data lies inside of the next piece: recv() up to it.
        """
        _translate(flags & ~DONTWAIT, {})
        with self._lock:
            lent = self._stack.lent
            got: list[Any] = self._until(
                lambda h: self._done(lent.received(h, pieces)), nonblocking=bool(flags & DONTWAIT)
            )
            self._stack.touched()
        return Received(self._stack, got)

    def alloc_zc(self, n: int = 1) -> list[SendBuffer]:
        """Up to n buffers, one at least, to write payload in for send_zc(). ENOBUFS: too many are out."""
        with self._lock:
            got: list[Any] = self._done(self._stack.lent.alloc(self._h(), n))
        return [SendBuffer(self._stack, m) for m in got]

    def send_zc(self, buffers: Sequence[SendBuffer], flags: int = 0) -> int:
        """Sends buffers of alloc_zc() as they are: how many, at least one; the rest has to be sent again. Those that
        were taken can be seen no more. MSG_MORE, MSG_OOB, MSG_DONTWAIT.

        Raises:
            BufferError: there is a view of one besides its `data`. ValueError: one was released or sent.
            OSError: as send(); EINVAL: there is none, or one has no bytes used.
        """
        ours = _translate(flags & ~DONTWAIT, SEND_FLAGS | OOB_FLAGS)
        with self._lock:
            lent = self._stack.lent
            sent: int = self._until(
                lambda h: self._done(lent.send(h, buffers, ours)),
                nonblocking=bool(flags & DONTWAIT),
                option=_socket.SO_SNDTIMEO,
            )
            self._stack.touched()
        return sent

    def makefile(
        self,
        mode: str = "r",
        buffering: int | None = None,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> io.IOBase:
        """A file object over the socket, as socket.makefile(). The socket closes when both are closed."""
        if not set(mode) <= {"r", "w", "b"}:
            raise ValueError(f"invalid mode {mode!r} (only r, w, b allowed)")
        writing, reading = "w" in mode, "r" in mode or "w" not in mode
        raw = _socket.SocketIO(self, ("r" if reading else "") + ("w" if writing else ""))  # type: ignore[arg-type]
        self._io_refs += 1
        size = io.DEFAULT_BUFFER_SIZE if buffering is None or buffering < 0 else buffering
        if size == 0:
            if "b" not in mode:
                raise ValueError("unbuffered streams must be binary")
            return raw
        buffer: Any
        if reading and writing:
            buffer = io.BufferedRWPair(raw, raw, size)
        elif reading:
            buffer = io.BufferedReader(raw, size)
        else:
            buffer = io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffer  # type: ignore[no-any-return]
        return io.TextIOWrapper(buffer, encoding, errors, newline)

    # ---- end
    def shutdown(self, how: int) -> None:
        """SHUT_RD, SHUT_WR or SHUT_RDWR."""
        with self._lock:
            self._stack.core.shutdown(self._h(), how)
            self._stack.touched()

    def close(self) -> None:
        """What was sent is still delivered, unless received data is unread or SO_LINGER says 0 seconds: then the peer
        gets a reset. Files made by makefile() keep the socket open."""
        self._close_wanted = True
        if self._io_refs <= 0:
            self._really_close()

    def _really_close(self) -> None:
        with self._lock:
            if self._handle >= 0 and not self._stack.core.closed:
                self._linger()
            handle, self._handle = self._handle, -1
            if handle >= 0:
                self._stack.close_handle(handle)
            self._stack.driver.cond.notify_all()  # threads that wait in this socket get EBADF

    def _linger(self) -> None:
        """Lock held. SO_LINGER with seconds: waits so long until the peer has acknowledged everything (socket(7))."""
        core, driver, handle = self._stack.core, self._stack.driver, self._handle
        if self.type != _socket.SOCK_STREAM or core.getopt(handle, lib.BYPASS_SO_LINGER) <= 0:
            return
        info = core.tcp_info(handle)
        if info.rcv_queued or info.state in ("CLOSED", "LISTEN", "SYN_SENT"):
            return
        deadline = driver.now_ns() + core.getopt(handle, lib.BYPASS_SO_LINGER) * 10**9
        with contextlib.suppress(OSError):  # it has ended meanwhile
            core.shutdown(handle, lib.BYPASS_SHUT_RDWR)
        self._stack.touched()
        while self._handle == handle and core.tcp_info(handle).state in LINGERING and driver.wait(deadline):
            pass

    def _decref_socketios(self) -> None:  # called by socket.SocketIO
        self._io_refs -= 1
        if self._close_wanted and self._io_refs <= 0:
            self._really_close()

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", -1) >= 0 and not self._stack.core.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            # The collector may run while this very thread holds the lock: nothing is closed here.
            self._stack.orphan(self._handle)

    # ---- options
    def settimeout(self, value: float | None) -> None:
        """Seconds that a call may block (of the virtual clock on a simulated wire); None: for ever; 0: not at all."""
        if value is not None and value < 0:
            raise ValueError("Timeout value out of range")
        self._timeout = value

    def gettimeout(self) -> float | None:
        return self._timeout

    @property
    def timeout(self) -> float | None:
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        self._timeout = None if flag else 0.0

    def getblocking(self) -> bool:
        return self._timeout != 0

    def setsockopt(self, level: int, optname: int, value: int | bytes) -> None:
        """The options of SOL_SOCKET, IPPROTO_TCP and IPPROTO_IP that the stack has (docs/sockets.md); ENOPROTOOPT for
        others."""
        with self._lock:
            sockopt.setsockopt(self, self._h(), level, optname, value)
            self._stack.touched()

    def getsockopt(self, level: int, optname: int, buflen: int = 0) -> int | bytes:
        """As an int; with buflen as bytes. SO_ERROR clears it. TCP_INFO: Linux' struct tcp_info."""
        with self._lock:
            value = sockopt.getsockopt(self, self._h(), level, optname, buflen)
        if isinstance(value, bytes):
            return (
                value[:buflen] if buflen else int.from_bytes(value[:4].ljust(4, b"\0"), "little", signed=True)
            )
        return (value & 0xFFFFFFFF).to_bytes(4, "little")[:buflen] if buflen else value

    # ---- the rest of socket.socket
    def fileno(self) -> int:
        """-1: there is no descriptor."""
        return -1

    def detach(self) -> int:
        """The handle of the stack; this object is closed, the handle is the caller's (Stack.close_handle)."""
        handle, self._handle = self._handle, -1
        return handle

    @property
    def stack(self) -> Stack:
        return self._stack

    def __repr__(self) -> str:
        state = "closed" if self._handle < 0 else f"handle {self._handle:#x}"
        return f"<bypass.sockets.Socket {self.type.name} {state} on {self._stack.name}>"


def create_server(stack: Stack, address: Address, *, backlog: int = 128) -> Socket:
    """A listening TCP socket, as socket.create_server()."""
    sock = Socket(stack)
    try:
        sock.setsockopt(SOL, _socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def create_connection(
    stack: Stack, address: Address, timeout: float | None = None, source_address: Address | None = None
) -> Socket:
    """A connected TCP socket, as socket.create_connection(). timeout in seconds; it stays set."""
    sock = Socket(stack)
    try:
        sock.settimeout(timeout)
        if source_address is not None:
            sock.bind(source_address)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock
