# SPDX-License-Identifier: Apache-2.0
"""Messages to and from bypass-fwd: a request and its answer, and in between what it tells unasked."""

from __future__ import annotations

import os
import socket
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from bypass._core import ffi, lib
from bypass.fwd.records import Event, ForwarderError, event_of

_ROOM = 131072  # bytes of the largest message
_FDS_ROOM = socket.CMSG_SPACE(lib.FWD_FDS * 4)
_TYPES: dict[str, int] = {
    name.removeprefix("FWD_"): number
    for number, name in ffi.typeof("enum fwd_type").elements.items()  # one list: fwd.h
}


class Connection:
    """A socket to bypass-fwd. One thread at a time.

    Args:
        sock: connected; this object's from here on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._seq = 0
        self._events: deque[Event] = deque()

    def fileno(self) -> int:
        """Readable when there are events."""
        return self._sock.fileno()

    def _ask(
        self,
        kind: str,
        struct: str = "struct fwd_head",
        values: Mapping[str, Any] | None = None,
        *,
        answer: str | None = None,
        size: int | None = None,
        fds: Sequence[int] = (),
        back: list[int] | None = None,
    ) -> Any:
        """One request and its answer, as the struct `answer` (default: that of the request)."""
        message = ffi.new(f"{struct} *", values or {})
        head = message if struct == "struct fwd_head" else message.head
        self._seq += 1
        head.type, head.seq = _TYPES[kind], self._seq
        data = ffi.buffer(message, ffi.sizeof(struct) if size is None else size)
        try:
            socket.send_fds(self._sock, [data], fds)
        except (BrokenPipeError, ConnectionResetError):
            raise ForwarderError("bypass-fwd has ended") from None
        while True:
            got, theirs = self._receive(0)
            about = ffi.cast("struct fwd_head *", got)
            if about.seq == self._seq:
                break
            self._note(got)
        if about.error:
            text = ffi.string(ffi.cast("struct fwd_error *", got).text).decode(errors="replace")
            raise OSError(about.error, text or os.strerror(about.error))
        if back is not None:
            back += theirs
        self._keep = got  # what is answered points into it
        return ffi.cast(f"{answer or struct} *", got)

    def _receive(self, flags: int) -> tuple[Any, list[int]]:
        fds = array("i")
        try:  # (socket.recv_fds() of Python 3.11 ignores flags)
            data, control, _, _ = self._sock.recvmsg(_ROOM, _FDS_ROOM, flags | socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, control = b"", []
        for level, kind, raw in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(raw[: len(raw) // fds.itemsize * fds.itemsize])
        if not data:
            raise ForwarderError("bypass-fwd has ended")
        room = ffi.new("uint64_t[]", _ROOM // 8)
        ffi.memmove(room, data, len(data))
        return room, list(fds)

    def _note(self, message: Any) -> None:
        event = event_of(message)
        if event is not None:
            self._events.append(event)

    def events(self) -> list[Event]:
        """What happened since the last call. Does not wait.

        Raises:
            ForwarderError: bypass-fwd has ended.
        """
        while True:
            try:
                self._note(self._receive(socket.MSG_DONTWAIT)[0])
            except BlockingIOError:
                break
        happened = list(self._events)
        self._events.clear()
        return happened

    @property
    def pending(self) -> bool:
        """There are events that came while an answer was waited for: fileno() does not tell them."""
        return bool(self._events)
