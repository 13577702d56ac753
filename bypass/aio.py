# SPDX-License-Identifier: Apache-2.0
"""asyncio on a bypass stack: start_server, open_connection, datagram endpoints, on the ordinary event loop.

Streams are asyncio's own StreamReader and StreamWriter; any asyncio.Protocol works too. There is no thread: the
device's descriptor is in the loop's selector, the stack's deadline is a timer of the loop, and one poll of the stack
serves all its connections.

On a simulated wire there are two ways. On an ordinary loop give the network pace="real": its clock then follows the
computer's. Or run everything in virtual time:

    bypass.aio.run(main(), network)

There the loop's own clock is the network's: asyncio.sleep(60) takes no time, and a run is the same every time.
"""

from __future__ import annotations

import asyncio
import errno
import selectors
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, ClassVar, TypeVar

from bypass._core import lib
from bypass.core import FOREVER, Address
from bypass.driver import Driver
from bypass.sim.network import Network, SimulationError
from bypass.sockets import raised
from bypass.stack_api import DGRAM, STREAM, Stack

__all__ = [
    "Server",
    "VirtualLoop",
    "create_connection",
    "create_datagram_endpoint",
    "create_server",
    "open_connection",
    "run",
    "start_server",
]

T = TypeVar("T")
ProtocolFactory = Callable[[], asyncio.BaseProtocol]

READABLE: int = lib.BYPASS_IN | lib.BYPASS_RDHUP | lib.BYPASS_HUP
WRITABLE: int = lib.BYPASS_OUT
FAILED: int = lib.BYPASS_ERR
READ_BYTES = 256 << 10
READ_TURN_BYTES = 1 << 20  # then other connections get their turn
STREAM_LIMIT = 64 << 10  # asyncio's own default


# ---- The loop and the stack -------------------------------------------------------------------------------------


class Hub:
    """Joins one event loop and one driver: polls, arms the timer, wakes those whose handles became ready."""

    _of: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, Hub]]] = (
        weakref.WeakKeyDictionary()
    )

    @classmethod
    def get(cls, driver: Driver) -> Hub:
        """The hub of the running loop for this driver."""
        loop = asyncio.get_running_loop()
        hubs = cls._of.setdefault(loop, {})
        hub = hubs.get(id(driver))
        if hub is None or hub.driver is not driver:
            hub = hubs[id(driver)] = cls(loop, driver)
        return hub

    def __init__(self, loop: asyncio.AbstractEventLoop, driver: Driver) -> None:
        self.loop = loop
        self.driver = driver
        self._thread = threading.get_ident()
        self._ready: deque[_Handle] = deque()
        self._users = 0
        self._timer: asyncio.TimerHandle | None = None
        self._pump_scheduled = False
        self._run_scheduled = False
        self._virtual = isinstance(loop, VirtualLoop) and loop.network is driver

    # -- lifetime: descriptors and timer are in the loop only while something uses them
    def retain(self) -> None:
        self._users += 1
        if self._users == 1:
            for fd in self.driver.fds():
                self.loop.add_reader(fd, self._pump)
        self.touched()

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            for fd in self.driver.fds():
                self.loop.remove_reader(fd)
            # What was just closed may still have to be sent and acknowledged: the timer goes on by itself.
        self.touched()

    # -- the stack's side
    def notify(self, handle: _Handle) -> None:
        """Lock held, any thread: the handle has something to do."""
        self._ready.append(handle)
        if threading.get_ident() == self._thread:
            if not self._run_scheduled:
                self._run_scheduled = True
                self.loop.call_soon(self._run_ready)
        else:
            self.loop.call_soon_threadsafe(self._run_ready)

    def touched(self) -> None:
        """Socket calls were made: let the stack send, once for all calls of this turn of the loop."""
        if not self._pump_scheduled and not self.loop.is_closed():
            self._pump_scheduled = True
            self.loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_scheduled = False
        driver = self.driver
        with driver.lock:
            driver.poll()
            if not self._virtual:
                self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        next_ns = self.driver.next_ns()
        if next_ns != FOREVER:
            self._timer = self.loop.call_later(max(0.0, self.driver.seconds_until(next_ns)), self._pump)

    def _run_ready(self) -> None:
        self._run_scheduled = False
        for _ in range(len(self._ready)):
            handle = self._ready.popleft()
            mask, handle.mask = handle.mask, 0
            if mask:
                handle.on_ready(mask)


class _Handle:
    """A handle of the stack whose events come to the loop. `mask` gathers them until on_ready(mask) is called."""

    def __init__(self, hub: Hub, stack: Stack, handle: int) -> None:
        self.hub = hub
        self.stack = stack
        self.handle = handle
        self.mask = 0
        hub.retain()

    def watch(self) -> None:
        """Lock held. Events from now on, and what is ready already."""
        self.stack.set_handler(self.handle, self._note)
        self._note(self.stack.core.ready(self.handle))

    def _note(self, mask: int) -> None:
        if mask and not self.mask:
            self.hub.notify(self)
        self.mask |= mask

    def on_ready(self, mask: int) -> None:
        raise NotImplementedError

    def drop(self, *, abort: bool = False) -> None:
        """Closes the handle."""
        if self.handle >= 0:
            handle, self.handle = self.handle, -1
            with self.stack.driver.lock:
                self.stack.close_handle(handle, abort=abort)
            self.mask = 0
            self.hub.release()


# ---- Streams ----------------------------------------------------------------------------------------------------


class StreamTransport(_Handle, asyncio.Transport):
    """An asyncio transport over a connected TCP handle.

    Extra info: `peername`, `sockname`, `stack`, `handle`.
    """

    def __init__(self, hub: Hub, stack: Stack, handle: int, server: Server | None = None) -> None:
        with stack.driver.lock:
            extra = {
                "sockname": stack.core.local(handle),
                "peername": stack.core.peer(handle),
                "stack": stack,
                "handle": handle,
            }
        asyncio.Transport.__init__(self, extra)
        _Handle.__init__(self, hub, stack, handle)
        self._protocol: asyncio.BaseProtocol = _NoProtocol()
        self._buffered: Any = None  # asyncio.BufferedProtocol
        self._server = server
        self._paused = False
        self._closing = False
        self._lost = False
        self._peer_done = False
        self._eof_wanted = False
        self._backlog: deque[memoryview] = deque()  # written, not yet taken by the stack
        self._backlog_bytes = 0
        self._low, self._high = 16 << 10, 64 << 10
        self._protocol_paused = False

    def start(self, protocol: asyncio.BaseProtocol) -> None:
        """connection_made(), then events."""
        self.set_protocol(protocol)
        protocol.connection_made(self)
        with self.stack.driver.lock:
            if self.handle >= 0:
                self.watch()

    # -- events
    def on_ready(self, mask: int) -> None:
        if self.handle < 0:
            return
        if mask & FAILED:
            with self.stack.driver.lock:
                code = self.stack.core.error(self.handle)
            if code:
                self._fail(raised(code))
                return
        if mask & WRITABLE and self._backlog:
            self._drain_backlog()
        if mask & READABLE and not self._paused and not self._closing:
            self._read_some()

    def _read_some(self) -> None:
        core, lock = self.stack.core, self.stack.driver.lock
        turn = 0
        while not (self._paused or self._closing or self._peer_done) and self.handle >= 0:
            if turn >= READ_TURN_BYTES:
                with lock:
                    self._note(lib.BYPASS_IN)
                return
            got: bytes | int
            if self._buffered is not None:
                got = self._read_buffered()
            else:
                with lock:
                    got = core.recv(self.handle, READ_BYTES)
            if isinstance(got, int) and got < 0:
                if got != -errno.EAGAIN:
                    self._fail(raised(-got))
                return
            self.hub.touched()  # the window may have opened
            if not got:
                self._on_eof()
                return
            if isinstance(got, bytes):
                self._protocol.data_received(got)  # type: ignore[attr-defined]
                turn += len(got)
            else:
                self._buffered.buffer_updated(got)
                turn += got

    def _read_buffered(self) -> int:
        buffer = self._buffered.get_buffer(READ_BYTES)
        with self.stack.driver.lock:
            return self.stack.core.recv_into(self.handle, buffer)

    def _on_eof(self) -> None:
        self._peer_done = True
        keep_open = self._protocol.eof_received()  # type: ignore[attr-defined]
        if not keep_open:
            self.close()

    # -- writing
    def write(self, data: Any) -> None:
        """Never blocks: what the stack does not take now is kept, and the protocol paused above the high mark."""
        if self._eof_wanted:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._closing or self._lost or self.handle < 0:
            return
        view = memoryview(data).cast("B")
        if not view:
            return
        taken = 0
        if not self._backlog:
            taken = self._try_send(view)
            if taken < 0:
                return
        if taken < len(view):
            rest = view[taken:]
            # Only bytes never change under us.
            self._backlog.append(rest if isinstance(data, bytes) else memoryview(bytes(rest)))
            self._backlog_bytes += len(rest)
            self._maybe_pause()

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def _try_send(self, view: memoryview) -> int:
        """Bytes taken; -1: the connection has failed."""
        core, lock = self.stack.core, self.stack.driver.lock
        taken = 0
        while taken < len(view):
            with lock:
                n = core.send(self.handle, view[taken:] if taken else view)
            if n < 0:
                if n == -errno.EAGAIN:
                    break
                self.hub.loop.call_soon(self._fail, raised(-n))
                return -1
            taken += n
        if taken:
            self.hub.touched()
        return taken

    def _drain_backlog(self) -> None:
        while self._backlog:
            view = self._backlog[0]
            taken = self._try_send(view)
            if taken < 0:
                return
            self._backlog_bytes -= taken
            if taken < len(view):
                self._backlog[0] = view[taken:]
                break
            self._backlog.popleft()
        self._maybe_resume()
        if not self._backlog:
            if self._closing:
                self._finish(None)
            elif self._eof_wanted:
                self._shutdown_write()

    def write_eof(self) -> None:
        """Half-close, after what was written."""
        if self._closing or self._eof_wanted:
            return
        self._eof_wanted = True
        if not self._backlog:
            self._shutdown_write()

    def _shutdown_write(self) -> None:
        if self.handle >= 0:
            with self.stack.driver.lock:
                self.stack.core.shutdown(self.handle, lib.BYPASS_SHUT_WR)
            self.hub.touched()

    def can_write_eof(self) -> bool:
        return True

    # -- flow control
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if high is None:
            high = 64 << 10 if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._low, self._high = low, high
        self._maybe_pause()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        """Bytes that the stack has not taken yet; what it holds in its send buffer is not counted."""
        return self._backlog_bytes

    def _maybe_pause(self) -> None:
        if self._backlog_bytes > self._high and not self._protocol_paused:
            self._protocol_paused = True
            self._protocol.pause_writing()

    def _maybe_resume(self) -> None:
        if self._protocol_paused and self._backlog_bytes <= self._low:
            self._protocol_paused = False
            self._protocol.resume_writing()

    def is_reading(self) -> bool:
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        if self._paused and not self._closing:
            self._paused = False
            with self.stack.driver.lock:
                if self.handle >= 0:
                    self._note(lib.BYPASS_IN)  # events of the pause were not acted on

    # -- end
    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Delivers what was written, then closes. connection_lost(None) follows."""
        if self._closing:
            return
        self._closing = True
        if not self._backlog:
            self.hub.loop.call_soon(self._finish, None)

    def abort(self) -> None:
        """Resets the connection."""
        self._closing = True
        self.hub.loop.call_soon(self._finish, None, True)

    def _fail(self, error: OSError) -> None:
        self._closing = True
        self._finish(error, True)

    def _finish(self, error: OSError | None, abort: bool = False) -> None:
        if self._lost:
            return
        self._lost = True
        self._backlog.clear()
        self._backlog_bytes = 0
        try:
            self._protocol.connection_lost(error)
        finally:
            self.drop(abort=abort)
            if self._server is not None:
                self._server.detach(self)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        self._buffered = protocol if isinstance(protocol, asyncio.BufferedProtocol) else None

    def __repr__(self) -> str:
        state = "closed" if self._lost else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state} peer={self.get_extra_info('peername')}>"


class _NoProtocol(asyncio.Protocol):
    """Until start()."""


class _Connecting(_Handle):
    """A connection under way; `done` is a future."""

    def __init__(self, hub: Hub, stack: Stack, handle: int) -> None:
        super().__init__(hub, stack, handle)
        self.done: asyncio.Future[None] = hub.loop.create_future()

    def on_ready(self, mask: int) -> None:
        if self.done.done() or not mask & (WRITABLE | FAILED | lib.BYPASS_HUP):
            return
        with self.stack.driver.lock:
            code = self.stack.core.error(self.handle)
        if code:
            self.done.set_exception(raised(code))
        else:
            self.done.set_result(None)

    def give_up_handle(self) -> int:
        """The handle goes on to another owner."""
        handle, self.handle = self.handle, -1
        with self.stack.driver.lock:
            self.stack.set_handler(handle, None)
        self.hub.release()
        return handle


async def _connect(stack: Stack, address: Address, local_addr: Address | None) -> StreamTransport:
    hub = Hub.get(stack.driver)
    with stack.driver.lock:
        handle = stack.open(STREAM)
    connecting = _Connecting(hub, stack, handle)
    try:
        with stack.driver.lock:
            if local_addr is not None:
                stack.bind(handle, local_addr)
            result = stack.connect(handle, address)
            if result == -errno.EINPROGRESS:
                connecting.watch()
        if result == -errno.EINPROGRESS:
            await connecting.done
        elif result < 0:
            raise raised(-result)
        return StreamTransport(hub, stack, connecting.give_up_handle())
    except BaseException:
        connecting.drop(abort=True)
        raise


async def create_connection(
    stack: Stack, protocol_factory: ProtocolFactory, address: Address, *, local_addr: Address | None = None
) -> tuple[StreamTransport, asyncio.BaseProtocol]:
    """As loop.create_connection(): (transport, protocol).

    Raises:
        OSError: ECONNREFUSED, ETIMEDOUT, EHOSTUNREACH ...; PermissionError when no rule grants the flow.
    """
    transport = await _connect(stack, address, local_addr)
    protocol = protocol_factory()
    transport.start(protocol)
    return transport, protocol


async def open_connection(
    stack: Stack, host: str, port: int, *, limit: int = STREAM_LIMIT, local_addr: Address | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As asyncio.open_connection(). limit: of the reader's buffer, bytes. Errors as create_connection()."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await create_connection(stack, lambda: protocol, (host, port), local_addr=local_addr)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


# ---- Servers ----------------------------------------------------------------------------------------------------


class Server(_Handle, asyncio.AbstractServer):
    """A listening socket whose connections get protocols. As asyncio.Server, without sockets.

    Attributes:
        address: where it listens; the port is the chosen one if 0 was asked for.
    """

    ACCEPT_TURN = 64

    def __init__(self, hub: Hub, stack: Stack, handle: int, factory: ProtocolFactory, backlog: int) -> None:
        super().__init__(hub, stack, handle)
        self._factory = factory
        self._backlog = backlog
        self._serving = False
        self._transports: set[StreamTransport] = set()
        self._closed: asyncio.Future[None] = hub.loop.create_future()
        with stack.driver.lock:
            self.address = stack.core.local(handle)

    async def start_serving(self) -> None:
        if not self._serving and self.handle >= 0:
            self._serving = True
            with self.stack.driver.lock:
                self.stack.listen(self.handle, self._backlog)
                self.watch()

    def on_ready(self, mask: int) -> None:
        for _ in range(self.ACCEPT_TURN):
            with self.stack.driver.lock:
                if self.handle < 0:
                    return
                try:
                    handle = self.stack.accept(self.handle)
                except OSError as e:  # ENFILE: handles are used up. It stays in the queue and is tried later
                    self.hub.loop.call_exception_handler(
                        {"message": "accept failed", "exception": e, "server": self}
                    )
                    self.hub.loop.call_later(0.1, self.on_ready, 0)
                    return
            if handle < 0:
                return
            self._serve(handle)
        with self.stack.driver.lock:
            self._note(lib.BYPASS_IN)

    def _serve(self, handle: int) -> None:
        transport = StreamTransport(self.hub, self.stack, handle, self)
        self._transports.add(transport)
        try:
            transport.start(self._factory())
        except Exception as e:  # noqa: BLE001 - the program's own error: reported as asyncio does, the server goes on
            self.hub.loop.call_exception_handler(
                {"message": "protocol of a new connection failed", "exception": e, "transport": transport}
            )
            transport.abort()

    def detach(self, transport: StreamTransport) -> None:
        """A connection has ended."""
        self._transports.discard(transport)
        if self.handle < 0 and not self._transports and not self._closed.done():
            self._closed.set_result(None)

    def close(self) -> None:
        """Stops listening; connections go on."""
        if self.handle >= 0:
            self._serving = False
            self.drop()
            if not self._transports and not self._closed.done():
                self._closed.set_result(None)

    def close_clients(self) -> None:
        """Closes all connections."""
        for transport in list(self._transports):
            transport.close()

    async def wait_closed(self) -> None:
        """Until it is closed and all connections have ended."""
        await asyncio.shield(self._closed)

    def is_serving(self) -> bool:
        return self._serving

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.hub.loop

    async def serve_forever(self) -> None:
        await self.start_serving()
        try:
            await asyncio.shield(self._closed)
        except asyncio.CancelledError:
            self.close()
            raise


async def create_server(
    stack: Stack,
    protocol_factory: ProtocolFactory,
    host: str,
    port: int,
    *,
    backlog: int = 1024,
    start_serving: bool = True,
) -> Server:
    """As loop.create_server(). host: a local address or "0.0.0.0"; port 0 chooses one.

    Raises:
        OSError: EADDRINUSE, EADDRNOTAVAIL; PermissionError when no rule grants the flow.
    """
    hub = Hub.get(stack.driver)
    with stack.driver.lock:
        handle = stack.open(STREAM)
        try:
            stack.core.setopt(handle, lib.BYPASS_SO_REUSEADDR, 1)
            stack.bind(handle, (host, port))
        except BaseException:
            stack.close_handle(handle)
            raise
    server = Server(hub, stack, handle, protocol_factory, backlog)
    if start_serving:
        try:
            await server.start_serving()
        except BaseException:
            server.close()
            raise
    return server


async def start_server(
    stack: Stack,
    client_connected_cb: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
    host: str,
    port: int,
    *,
    limit: int = STREAM_LIMIT,
    backlog: int = 1024,
) -> Server:
    """As asyncio.start_server(): client_connected_cb(reader, writer) for each connection, a coroutine or a function."""
    loop = asyncio.get_running_loop()

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, client_connected_cb, loop=loop)

    return await create_server(stack, factory, host, port, backlog=backlog)


# ---- Datagrams --------------------------------------------------------------------------------------------------


class DatagramTransport(_Handle, asyncio.DatagramTransport):
    """An asyncio transport over a UDP handle. Extra info: `sockname`, `peername` (connected), `stack`, `handle`."""

    RECV_TURN = 256

    def __init__(
        self, hub: Hub, stack: Stack, handle: int, protocol: asyncio.DatagramProtocol, peer: Address | None
    ) -> None:
        with stack.driver.lock:
            extra = {"sockname": stack.core.local(handle), "peername": peer, "stack": stack, "handle": handle}
        asyncio.DatagramTransport.__init__(self, extra)
        _Handle.__init__(self, hub, stack, handle)
        self._protocol = protocol
        self._peer = peer
        self._closing = False
        self._lost = False
        self._backlog: deque[tuple[bytes, Address | None]] = deque()

    def start(self) -> None:
        self._protocol.connection_made(self)
        with self.stack.driver.lock:
            if self.handle >= 0:
                self.watch()

    def on_ready(self, mask: int) -> None:
        if mask & FAILED and self.handle >= 0:
            with self.stack.driver.lock:
                code = self.stack.core.error(self.handle)
            if code:
                self._protocol.error_received(raised(code))
        while mask & WRITABLE and self._backlog and self._send(*self._backlog[0]):
            self._backlog.popleft()
        if self._closing and not self._backlog:
            self._finish()
        for _ in range(self.RECV_TURN):
            if self.handle < 0 or self._closing:
                return
            with self.stack.driver.lock:
                got = self.stack.core.recvfrom(self.handle, 65536)
            if isinstance(got, int):
                if got != -errno.EAGAIN:
                    self._protocol.error_received(raised(-got))
                return
            self._protocol.datagram_received(got[0], got[1])
        with self.stack.driver.lock:
            if self.handle >= 0:
                self._note(lib.BYPASS_IN)

    def _send(self, data: Any, address: Address | None) -> bool:
        """False: no room now."""
        with self.stack.driver.lock:
            sent = self.stack.sendto(self.handle, data, address)
        self.hub.touched()
        if sent == -errno.EAGAIN:
            return False
        if sent < 0:
            self._protocol.error_received(raised(-sent))
        return True

    def sendto(self, data: Any, addr: Any = None) -> None:
        """One datagram, kept until there is room. Errors come to protocol.error_received()."""
        if self._closing or self.handle < 0:
            return
        if self._backlog or not self._send(data, addr):
            self._backlog.append((bytes(data), addr))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._backlog:
                self.hub.loop.call_soon(self._finish)

    def abort(self) -> None:
        self._closing = True
        self._backlog.clear()
        self.hub.loop.call_soon(self._finish)

    def _finish(self) -> None:
        if not self._lost:
            self._lost = True
            try:
                self._protocol.connection_lost(None)
            finally:
                self.drop()

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.DatagramProtocol)
        self._protocol = protocol


async def create_datagram_endpoint(
    stack: Stack,
    protocol_factory: Callable[[], asyncio.DatagramProtocol],
    local_addr: Address | None = None,
    remote_addr: Address | None = None,
) -> tuple[DatagramTransport, asyncio.DatagramProtocol]:
    """As loop.create_datagram_endpoint(): (transport, protocol). At least one address is needed.

    Raises:
        OSError: EADDRINUSE, EADDRNOTAVAIL; PermissionError when no rule grants the flow.
    """
    if local_addr is None and remote_addr is None:
        raise ValueError("a local or a remote address is needed")
    hub = Hub.get(stack.driver)
    with stack.driver.lock:
        handle = stack.open(DGRAM)
        try:
            if local_addr is not None:
                stack.bind(handle, local_addr)
            if remote_addr is not None:
                result = stack.connect(handle, remote_addr)
                if result < 0:
                    raise raised(-result)
        except BaseException:
            stack.close_handle(handle)
            raise
    protocol = protocol_factory()
    transport = DatagramTransport(hub, stack, handle, protocol, remote_addr)
    transport.start()
    return transport, protocol


# ---- Virtual time -----------------------------------------------------------------------------------------------


class _VirtualSelector(selectors.BaseSelector):
    """Where a loop sleeps, the network runs: select(timeout) lets so much virtual time pass."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        network = self._network
        with network.lock:
            # Rounded up, so that the timer for which the loop sleeps is due afterwards.
            now = network.now_ns()
            limit = FOREVER if timeout is None else now + (int(max(timeout, 0.0) * 1e9) + 1 if timeout else 0)
            if ready:
                limit = now
            reason = network.advance(limit)
        if reason == lib.SIM_IDLE and not ready:
            if threading.active_count() == 1:
                raise SimulationError(
                    f"the loop would wait for ever: at {network.now_ns()} ns nothing is on a wire and no timer runs"
                )
            return self._real.select(None)
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Any:
        return self._real.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is that of a simulated network."""

    def __init__(self, network: Network) -> None:
        self.network = network
        super().__init__(_VirtualSelector(network))

    def time(self) -> float:
        """Seconds since the network's start."""
        return (self.network.now_ns() - self.network.start_ns) / 1e9


def run(main: Coroutine[Any, Any, T], network: Network, *, debug: bool | None = None) -> T:
    """As asyncio.run(), in the virtual time of a simulated network."""
    with asyncio.Runner(debug=debug, loop_factory=lambda: VirtualLoop(network)) as runner:
        return runner.run(main)
