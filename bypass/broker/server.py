# SPDX-License-Identifier: Apache-2.0
"""The broker's socket and its one loop. No thread, and nothing that waits for an application.

What lives here: accepting, reading and writing without blocking, time. What does not: what messages mean (broker.py).
A connection that breaks the rules of the socket (a packet that is no message) is closed, which ends its process's part.

Source: unix(7), epoll(7), pidfd_open(2).
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

from bypass.broker import protocol
from bypass.broker.admin import Admin
from bypass.broker.apps import Process
from bypass.broker.broker import Broker
from bypass.broker.closer import Closer
from bypass.broker.looks import Looks
from bypass.broker.protocol import Message
from bypass.broker.site import Site
from bypass.broker.users import peer_of, pidfd_of
from bypass.errors import BypassError

log = logging.getLogger("bypass.broker")

BACKLOG = 128
MESSAGES_PER_TURN = 16
"""Of one connection, before the next one has its turn."""
MAX_PROCESSES = 4096
MAX_PER_USER = 512
"""Connections of one user who is not trusted."""


def listen(name: str) -> socket.socket:
    """A listening socket at a path, or at an abstract name with a leading @. A path that nobody listens at is taken
    over.

    Raises:
        BypassError: somebody listens there, or it cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        if not name.startswith("@"):
            _clear_path(name)
        sock.bind(protocol.socket_address(name))
        sock.listen(BACKLOG)
        if not name.startswith("@"):
            os.chmod(name, 0o666)  # who may what is decided by who asks
    except OSError as e:
        sock.close()
        if e.errno == errno.EADDRINUSE:
            raise BypassError(f"{name}: a broker runs already; end it by `bypass down`") from e
        raise BypassError(f"{name}: {e.strerror}") from e
    return sock


def _clear_path(name: str) -> None:
    """Makes room: the folder, and the file of a broker that was killed. OSError EADDRINUSE: one runs."""
    folder = os.path.dirname(name)
    if folder:
        os.makedirs(folder, mode=0o755, exist_ok=True)
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(name).st_mode):
            raise FileExistsError(errno.EEXIST, "something else is at that path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
            code = probe.connect_ex(name)
        if code != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        os.unlink(name)


class Server:
    """Serves one site. A context manager; close() ends it and every application.

    Args:
        site: where packets come from; the server closes it.
        sock: listening, as listen() makes it; the server closes it.
        path: of the socket's file, which is removed at the end; empty: there is none, or it is somebody else's.
        trusted: users who may use every rule, beside root and the one who runs this.
    """

    def __init__(
        self, site: Site, sock: socket.socket, path: str = "", *, trusted: frozenset[int] = frozenset()
    ) -> None:
        self._sock = sock
        self._trusted = trusted | {0, os.geteuid()}
        self._path = path
        self._epoll = select.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._processes: dict[int, Process] = {}  # by descriptor
        self._unsent: set[Process] = set()
        self._fresh: set[int] = set()  # watched since this turn's events were read
        self._ready: dict[int, None] = {}  # connections with more to read than one turn takes
        self._stopped = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closer = Closer()
        self._threads: dict[threading.Thread, int] = {}  # with what tells their end
        self.broker = Broker(site, self, protocol.name_of(sock), time.monotonic_ns)
        self._looks = Looks(self)
        self.admin = Admin(self.broker, self.changed, self.stop, self._later, self._looks)
        sock.setblocking(False)
        self.watch(self._wake, lambda: None)
        self.watch(sock.fileno(), self._accept)
        for fd, call in site.watched().items():
            self.watch(fd, call)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Again: nothing."""
        if self._epoll.closed:
            return
        self._stopped = True  # nobody has to be woken any more
        for thread in list(self._threads):
            self._joined(thread)
        self._looks.close()
        self.broker.close()
        self._flush()
        for process in list(self._processes.values()):
            self._close(process)
        self._sock.close()
        self._epoll.close()
        os.close(self._wake)
        if self._path:
            with suppress(FileNotFoundError):
                os.unlink(self._path)

    # ---- the loop
    def run(self) -> None:
        """Until stop()."""
        while not self._stopped:
            self.turn()

    @property
    def stopped(self) -> bool:
        return self._stopped

    def stop(self) -> None:
        """Ends run() soon. May be called by a signal handler, or another thread."""
        if not self._stopped:
            self._stopped = True
            os.eventfd_write(self._wake, 1)

    def on_signal(self, actions: Mapping[signal.Signals, Callable[[], None]]) -> None:
        """Has the loop act on signals. In the main thread; lasts until the process ends."""
        come: set[int] = set()

        def note(number: int, frame: object) -> None:
            come.add(number)
            os.eventfd_write(self._wake, 1)

        def act() -> None:
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            for number in list(come):
                come.discard(number)
                actions[signal.Signals(number)]()

        self._watched[self._wake] = act
        for number in actions:
            signal.signal(number, note)

    def turn(self, timeout: float | None = None) -> None:
        """Waits until something happens, or for so many seconds, and does it."""
        events = self._epoll.poll(self._timeout(timeout))
        self._fresh.clear()
        for fd, _ in events:
            call = self._watched.get(fd)
            # Else it was dropped in this turn; or the event is of another one that had the number until then.
            if call is not None and fd not in self._fresh:
                call()
        for fd in list(self._ready):
            del self._ready[fd]
            if fd in self._processes:
                self._serve(self._processes[fd])
        self.broker.tick()
        self.admin.progress()
        self._flush()

    def _timeout(self, timeout: float | None) -> float:
        if self._ready:
            return 0
        due = self.broker.due_ns()
        if due is not None:
            left = max(0.0, (due - time.monotonic_ns()) / 1e9)
            timeout = left if timeout is None else min(left, timeout)
        return -1 if timeout is None else timeout

    # ---- Loop of bypass.broker.state
    def watch(self, fd: int, call: Callable[[], None]) -> None:
        self._watched[fd] = call
        self._fresh.add(fd)
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def changed(self, process: Process) -> None:
        self._unsent.add(process)

    def drop(self, process: Process) -> None:
        self._end(process, dead=False)

    def _later(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """work() in a thread, then done() in the loop, unless the loop has ended."""
        ready = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

        def run() -> None:
            try:
                work()
            finally:
                os.eventfd_write(ready, 1)

        def finish() -> None:
            self._joined(thread)
            done()

        thread = threading.Thread(target=run, name="bypass reload")
        self._threads[thread] = ready
        self.watch(ready, finish)
        thread.start()

    def _joined(self, thread: threading.Thread) -> None:
        thread.join()
        ready = self._threads.pop(thread)
        self.unwatch(ready)
        os.close(ready)

    # ---- connections
    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as e:
            if e.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            log.error("no connection more: %s", e.strerror)
            return
        pid, user = peer_of(sock, self._trusted)
        mine = sum(p.user.uid == user.uid for p in self._processes.values())
        many = len(self._processes) >= MAX_PROCESSES or (mine >= MAX_PER_USER and not user.trusted)
        if many or self._closer.exhausted(user.uid):
            log.warning("user %d has %d connections: one more is refused", user.uid, mine)
            sock.close()
            return
        sock.setblocking(False)
        process = Process(sock, pid, user, pidfd_of(sock, pid))
        self._processes[sock.fileno()] = process
        self.watch(sock.fileno(), lambda: self._ready_for(process))
        if process.pidfd >= 0:
            self.watch(process.pidfd, lambda: self._end(process, dead=True))

    def _ready_for(self, process: Process) -> None:
        if process.waiting:
            self._unsent.add(process)
        self._serve(process)

    def _serve(self, process: Process) -> None:
        """Reads what has come, as far as it is this connection's turn."""
        for _ in range(MESSAGES_PER_TURN):
            if process.closed:
                return
            if process.paused:
                self._unsent.add(process)
                return
            try:
                got = protocol.receive(process.sock)
            except OSError:
                self._end(process, dead=False)
                return
            if got is None:
                return
            if not self._packet(process, *got):
                self._end(process, dead=False)
                return
        if not process.closed:
            self._ready[process.sock.fileno()] = None

    def _packet(self, process: Process, data: bytes, fds: list[int], whole: bool) -> bool:
        """Acts on one packet. False: it is the end, or breaks the rules."""
        try:
            if not data or (fds and self._closer.exhausted(process.user.uid)):
                return False
            if data[:1] == b"{" and process.app is None:
                self.admin.request(process, data)
                return True
            message = Message.unpack(data)
            if not whole:
                log.debug("process %d: descriptors were lost: too many in a message, or here", process.pid)
            self.broker.message(process, message, fds)
        except ValueError as e:
            log.info("process %d of user %d: %s", process.pid, process.user.uid, e)
            return False
        finally:
            for fd in fds:
                self._closer.close(fd, process.user.uid)
        return True

    def _flush(self) -> None:
        """Sends what can be sent, and asks to be told when the rest can."""
        for process in list(self._unsent):
            self._unsent.discard(process)
            if process.closed:
                continue
            try:
                done = process.flush()
                if done and process.lagging:
                    self.broker.caught_up(process)
                    done = process.flush()
            except OSError:
                self._end(process, dead=False)
                continue
            events = 0 if process.paused else select.EPOLLIN
            self._epoll.modify(process.sock, events if done else events | select.EPOLLOUT)

    def _end(self, process: Process, *, dead: bool) -> None:
        """The process has ended, or has to."""
        if not process.closed:
            self.broker.gone(process, dead=dead)
            self._close(process)

    def _close(self, process: Process) -> None:
        fd = process.sock.fileno()
        self._ready.pop(fd, None)
        self._processes.pop(fd, None)
        self.unwatch(fd)
        if process.pidfd >= 0:
            self.unwatch(process.pidfd)
        process.close()
