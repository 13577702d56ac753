# SPDX-License-Identifier: Apache-2.0
"""A simulated network: stacks and raw ports on wires, a virtual clock, faults, recording.

The simulation itself is C (bypass/sim/*.c). Here: its objects, and the driver that gives stacks of a simulated
network their time. A run depends on nothing but its seed and the calls that are made.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bypass._core import ffi, lib
from bypass.core import FOREVER, Config, CoreStack, check
from bypass.driver import Driver
from bypass.errors import BypassError
from bypass.sim.pcap import Frame, PcapngWriter, Recorder, write_pcapng

if TYPE_CHECKING:
    from bypass.stack_api import Stack

__all__ = ["DeviceFaults", "Fate", "Faults", "Network", "Port", "RawPort", "SimulationError", "Wire"]

PPM = 1_000_000


class SimulationError(BypassError):
    """A simulation that cannot go on, or that did not end clean."""


class Fate:
    """What a script does with a frame (Port.script)."""

    PASS, LOSE, DUPLICATE, CORRUPT, REORDER, RANDOM = range(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What happens to the frames that one port sends. The default is a perfect wire without delay.

    Attributes:
        loss, duplicate, corrupt, reorder: probabilities, 0..1; a frame meets at most one of them. Corrupted: one to
            three bits flipped within one 16-bit word that a checksum covers (RFC 1071); frames without any checksum
            (ARP) are lost instead.
        reorder_ns: a reordered frame is held back for up to so long, so that later ones overtake it.
        delay_ns: of every frame; jitter_ns: added, uniform in 0..jitter_ns, order is kept.
        rate_bps: bits a second of Ethernet frame without FCS; 0: no limit.
        queue_bytes: what may wait for the rate; the rest is dropped. 0: 262144.
        mtu: larger IP packets are dropped, bytes; 0: no limit.
        mark_bytes: an ECN-capable packet that finds more waiting for the rate is marked (CE); 0: none is.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    reorder: float = 0.0
    reorder_ns: int = 1_000_000
    delay_ns: int = 0
    jitter_ns: int = 0
    rate_bps: int = 0
    queue_bytes: int = 0
    mtu: int = 0
    mark_bytes: int = 0

    def c(self) -> Any:
        f = ffi.new("struct sim_faults *")
        for name in ("loss", "duplicate", "corrupt", "reorder"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, 0..1, not {value}")
            setattr(f, f"{name}_ppm", round(value * PPM))
        if self.loss + self.duplicate + self.corrupt + self.reorder > 1:
            raise ValueError(
                "loss, duplicate, corrupt and reorder exclude each other: their sum is at most 1"
            )
        for name in ("reorder_ns", "delay_ns", "jitter_ns", "rate_bps", "queue_bytes", "mtu", "mark_bytes"):
            setattr(f, name, getattr(self, name))
        return f


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFaults:
    """What a bad day of the network device looks like to its stack.

    Attributes:
        alloc_fail: probability that no frame is to be had; tx_short: that only a part of a batch is taken;
        kick_again: that the kick gives EAGAIN.
        down: no carrier.
        gone: the device was removed: every call fails with ENXIO, frames on their way to it are lost.
        complete_ns: transmissions are completed so much later.
        keep: a transmission is completed only when so many more have followed it, as some drivers of DPDK do
            (`lib.BYPASS_CAP_TX_LAZY` of the port's caps tells the stack).
    """

    alloc_fail: float = 0.0
    tx_short: float = 0.0
    kick_again: float = 0.0
    down: bool = False
    gone: bool = False
    complete_ns: int = 0
    keep: int = 0

    def c(self) -> Any:
        f = ffi.new("struct sim_device_faults *")
        for name in ("alloc_fail", "tx_short", "kick_again"):
            setattr(f, f"{name}_ppm", round(getattr(self, name) * PPM))
        f.down = self.down
        f.gone = self.gone
        f.keep = self.keep
        f.complete_ns = self.complete_ns
        return f


@dataclass(frozen=True, slots=True)
class PortStats:
    """Counters of a port (struct sim_port_stats): of what it sent, and of what was sent to it."""

    tx_frames: int
    tx_bytes: int
    rx_frames: int
    rx_bytes: int
    lost: int
    duplicated: int
    corrupted: int
    reordered: int
    queue_dropped: int
    marked: int
    oversize: int
    in_flight_dropped: int
    no_frame: int
    down_dropped: int
    misuse: int
    in_flight: int
    rx_waiting: int
    unreaped: int
    held: int


def parse_mac(text: str) -> bytes:
    mac = bytes.fromhex(text.replace(":", ""))
    if len(mac) != 6:
        raise ValueError(f"{text!r} is not a MAC address")
    return mac


class Port:
    """A network device on a wire."""

    def __init__(self, wire: Wire, name: str, mac: bytes, flags: int = 0, **sizes: int) -> None:
        cfg = ffi.new("struct sim_port_config *", {"flags": flags, "mac": mac, **sizes})
        self.wire = wire
        self.name = name
        self.mac = mac
        self._dev: Any = lib.sim_port_create(wire.c, cfg)
        if not self._dev:
            raise SimulationError(f"port {name}: no memory, or sizes out of range: {sizes}")
        wire.network._port_added(self)

    @property
    def dev(self) -> Any:
        """The `struct bypass_netdev *`. SimulationError when the network is closed: it is gone."""
        if self._dev is None:
            raise SimulationError(f"port {self.name}: its network is closed")
        return self._dev

    netdev = dev  # as bypass.afxdp.AfxdpDevice names it

    def closed(self) -> None:
        """The network has ended."""
        self._dev = None

    def set_faults(self, faults: Faults) -> None:
        """From now on, for the frames that this port sends."""
        lib.sim_port_faults(self.dev, faults.c())

    def set_device_faults(self, faults: DeviceFaults) -> None:
        lib.sim_port_device_faults(self.dev, faults.c())

    def script(self, fates: bytes | list[int]) -> None:
        """Fates (Fate.*) of the next frames that this port sends, one each; then the faults hold again."""
        check(lib.sim_port_script(self.dev, bytes(fates), len(fates)))

    def stats(self) -> PortStats:
        s = ffi.new("struct sim_port_stats *")
        lib.sim_port_stats(self.dev, s)
        return PortStats(*(int(getattr(s, f.name)) for f in fields(PortStats)))


class RawPort(Port):
    """A port with Python at its end: sends and receives whole Ethernet frames (without FCS).

    It sees every frame of its wire. With `on_frame` set, each frame is handed to on_frame(time_ns, frame) as soon as
    it arrives, which may send; else recv() collects them.
    """

    def __init__(self, wire: Wire, name: str, mac: bytes, **sizes: int) -> None:
        super().__init__(wire, name, mac, lib.SIM_PORT_RAW, **sizes)
        self.on_frame: Callable[[int, bytes], None] | None = None
        self._received: deque[tuple[int, bytes]] = deque()
        self._buffer: Any = ffi.new("uint8_t[]", 65536)
        self._time: Any = ffi.new("uint64_t *")

    def send(self, frame: bytes) -> None:
        """Into the wire, now. OSError EMSGSIZE: shorter than an Ethernet header, or too long for the device."""
        check(lib.sim_port_send(self.dev, frame, len(frame)))

    def recv(self) -> list[tuple[int, bytes]]:
        """What has arrived since the last call: (virtual time in ns, frame), oldest first."""
        self._drain()
        out = list(self._received)
        self._received.clear()
        return out

    def _drain(self) -> None:
        while (n := lib.sim_port_recv(self.dev, self._buffer, 65536, self._time)) >= 0:
            frame = ffi.buffer(self._buffer, n)[:]
            if self.on_frame is not None:
                self.on_frame(int(self._time[0]), frame)
            else:
                self._received.append((int(self._time[0]), frame))


class Wire:
    """A segment that ports are plugged into."""

    def __init__(self, network: Network, name: str, switch: bool, faults: Faults) -> None:
        self.network = network
        self.name = name
        self.faults = faults
        self.ports: list[Port] = []
        self.c: Any = lib.sim_wire_create(network.c, lib.SIM_WIRE_SWITCH if switch else 0)
        if not self.c:
            raise MemoryError("no memory for a wire")

    def set_faults(self, faults: Faults) -> None:
        """For all its ports, and those that are added later."""
        self.faults = faults
        for port in self.ports:
            port.set_faults(faults)

    def port(self, name: str | None = None, *, mac: str | None = None, **sizes: int) -> Port:
        """A port for a stack. sizes: frames, in_flight, tx_ring, mtu, queues, caps of struct sim_port_config."""
        name, address = self._identity(name, mac)
        return Port(self, name, address, **sizes)

    def raw_port(self, name: str | None = None, *, mac: str | None = None, **sizes: int) -> RawPort:
        """A port for Python."""
        name, address = self._identity(name, mac)
        return RawPort(self, name, address, **sizes)

    def _identity(self, name: str | None, mac: str | None) -> tuple[str, bytes]:
        n = len(self.network.ports) + 1
        return name or f"port{n}", parse_mac(mac) if mac else b"\x02\0\0\0" + n.to_bytes(2, "big")


class Capture:
    """Frames of some ports, written to a pcapng file while the simulation runs. Close it to complete the file."""

    def __init__(self, network: Network, path: Path, ports: list[Port], size: int) -> None:
        self.path = path
        self._network = network
        self._recorder = Recorder(size)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._ports = ports
        self._writer = PcapngWriter(self._file, [p.name for p in ports])
        for i, port in enumerate(ports):
            lib.sim_port_capture(port.dev, self._recorder.c, i)

    def flush(self) -> None:
        for frame in self._recorder.read():
            self._writer.write(frame)

    def close(self) -> None:
        if self._file.closed:
            return
        self._network._captures.remove(self)
        if self._network.c:
            for port in self._ports:
                lib.sim_port_capture(port.dev, ffi.NULL, 0)
        self.flush()
        self._file.close()

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Network(Driver):
    """A virtual clock with wires and the stacks on them.

    Args:
        seed: every random decision derives from it, the stacks' secrets too.
        start_ns: the clock's first time.
        pace: "virtual": a blocking call moves the clock as far as it needs, at once. "real": the clock follows the
            computer's, for programs that mix the simulation with threads or with an ordinary asyncio loop.

    The first wire is made on demand: `Network().stack("10.0.0.1/24")` is enough.
    """

    EVENTS = 512

    def __init__(
        self, seed: int = 0, *, start_ns: int = 1_000_000_000, pace: Literal["virtual", "real"] = "virtual"
    ) -> None:
        super().__init__()
        self.seed = seed
        self.pace = pace
        self.c: Any = lib.sim_create(seed & (2**64 - 1), start_ns)
        if not self.c:
            raise MemoryError("no memory for a simulation")
        self.start_ns = start_ns
        self._real_start_ns = time.monotonic_ns()
        self.wires: list[Wire] = []
        self.ports: list[Port] = []
        self._raw: list[RawPort] = []
        self._stacks: dict[int, Stack] = {}  # by number in C
        self._captures: list[Capture] = []
        self._flight: Recorder | None = None
        self._events: Any = ffi.new("struct sim_event[]", self.EVENTS)
        self._result: Any = ffi.new("struct sim_result *")
        self._envs = 0
        self._ended_ns = 0

    # ---- building
    def wire(self, name: str | None = None, *, switch: bool = False, faults: Faults | None = None) -> Wire:
        """A new wire. switch: frames to a known MAC go only to its port; else every port sees every frame."""
        wire = Wire(self, name or f"wire{len(self.wires) + 1}", switch, faults or Faults())
        self.wires.append(wire)
        return wire

    @property
    def default_wire(self) -> Wire:
        return self.wires[0] if self.wires else self.wire()

    def stack(
        self,
        address: str,
        *,
        wire: Wire | None = None,
        name: str | None = None,
        gateway: str | None = None,
        config: Config | None = None,
        flags: int | None = None,
        mac: str | None = None,
        faults: Faults | None = None,
        **sizes: int,
    ) -> Stack:
        """A stack on a wire.

        Args:
            address: with prefix length, such as "10.0.0.1/24".
            wire: None: the first one.
            flags: lib.BYPASS_F_*; None: ARP, ping and resets, as a host alone on its wire needs them.
            faults: of the frames it sends; None: the wire's.
            sizes: of its port: frames, in_flight, tx_ring, mtu, queues, caps.

        Raises:
            OSError: what bypass_create() and bypass_addr_add() say.
        """
        from bypass.stack_api import Stack

        port = (wire or self.default_wire).port(name, mac=mac, **sizes)
        if faults is not None:
            port.set_faults(faults)
        env = ffi.new("struct bypass_env *")
        check(lib.sim_env(self.c, env, self._envs))
        self._envs += 1
        env.log = lib.host_log
        if flags is None:
            flags = lib.BYPASS_F_ARP | lib.BYPASS_F_PING | lib.BYPASS_F_RST
        core = CoreStack(port.dev, config=config, flags=flags, now_ns=self.now_ns(), env=env, owner=self)
        ip, _, prefix = address.partition("/")
        core.addr_add(ip, int(prefix or 24))
        if gateway is not None:
            core.gateway_set(gateway)
        number = check(lib.sim_stack_add(self.c, core.c, port.dev))
        stack = Stack(core, self, name=port.name, port=port)
        self._stacks[number] = stack
        return stack

    def raw_port(
        self, name: str | None = None, *, wire: Wire | None = None, mac: str | None = None
    ) -> RawPort:
        """A port with Python at its end, on the first wire unless another is given."""
        return (wire or self.default_wire).raw_port(name, mac=mac)

    def _port_added(self, port: Port) -> None:
        port.set_faults(port.wire.faults)
        port.wire.ports.append(port)
        self.ports.append(port)
        if isinstance(port, RawPort):
            self._raw.append(port)
        if self._flight is not None:
            lib.sim_port_capture(port.dev, self._flight.c, len(self.ports) - 1)

    # ---- time
    def now_ns(self) -> int:
        return int(lib.sim_now(self.c)) if self.c else self._ended_ns

    def run(
        self,
        until: Callable[[], bool] | None = None,
        *,
        duration_ns: int | None = None,
        until_ns: int | None = None,
    ) -> bool:
        """Runs the simulation.

        Args:
            until: stops as soon as it is true; it is asked whenever a stack has an event.
            duration_ns, until_ns: stops at this time, from now or absolute. Without either: when nothing will ever
                happen again.

        Returns:
            Whether `until` came true; without `until`: True.

        Raises:
            SimulationError: stacks keep sending to each other without time passing.
        """
        limit = FOREVER if until_ns is None else until_ns
        if duration_ns is not None:
            limit = min(limit, self.now_ns() + duration_ns)
        with self.lock:
            while not (until is not None and until()):
                if self.advance(limit) in (lib.SIM_TIME, lib.SIM_IDLE):
                    return until is None or until()
        return True

    def advance(self, limit_ns: int) -> int:
        """Lock held. Runs until something happened for Python, or the limit; the reason, lib.SIM_*."""
        r = self._result
        err = lib.sim_run(self.c, limit_ns, self._events, self.EVENTS, r)
        if err == -40:  # ELOOP
            raise SimulationError(
                f"stacks keep sending to each other at {self.now_ns()} ns (seed {self.seed})"
            )
        check(err)
        for e in self._events[0 : r.events]:
            stack = self._stacks.get(e.stack)
            if stack is not None:
                stack.dispatch(e.user, e.mask)
        if r.reason == lib.SIM_RAW:
            for raw in self._raw:
                raw._drain()
        for capture in self._captures:
            capture.flush()
        if r.reason not in (lib.SIM_TIME, lib.SIM_IDLE):
            self.cond.notify_all()
        return int(r.reason)

    def _real_now_ns(self) -> int:
        return self.start_ns + time.monotonic_ns() - self._real_start_ns

    # ---- Driver
    def wait(self, deadline_ns: int) -> bool:
        limit = deadline_ns if self.pace == "virtual" else min(deadline_ns, self._real_now_ns())
        if self.advance(limit) not in (lib.SIM_TIME, lib.SIM_IDLE):
            return True
        if self.now_ns() >= deadline_ns:
            return False
        if self.pace == "real":
            later = min(deadline_ns, self.next_ns())
            self.cond.wait(None if later == FOREVER else max(0.0, self.seconds_until(later)))
        elif threading.active_count() > 1:
            self.cond.wait()  # only another thread can make something happen
        else:
            raise SimulationError(
                f"this call would block for ever: at {self.now_ns()} ns nothing is on a wire and no timer runs"
            )
        return True

    def touched(self, stack: Stack) -> None:
        self.cond.notify_all()

    def poll(self) -> None:
        """What is due now, without moving a virtual clock; a clock of pace "real" goes to the present."""
        limit = self._real_now_ns() if self.pace == "real" else self.now_ns()
        while self.advance(limit) not in (lib.SIM_TIME, lib.SIM_IDLE):
            pass

    def next_ns(self) -> int:
        return int(lib.sim_next(self.c))

    def seconds_until(self, time_ns: int) -> float:
        now = self._real_now_ns() if self.pace == "real" else self.now_ns()
        return (time_ns - now) / 1e9

    def remove(self, stack: Stack) -> None:
        for number, s in list(self._stacks.items()):
            if s is stack:
                lib.sim_stack_del(self.c, number)
                del self._stacks[number]

    # ---- recording
    def capture(self, path: str | Path, *ports: Port, size: int = 8 << 20) -> Capture:
        """Writes the frames of these ports (none named: of all so far) to a pcapng file, until it is closed."""
        capture = Capture(self, Path(path), list(ports) or list(self.ports), size)
        self._captures.append(capture)
        return capture

    def record(self, size: int = 4 << 20) -> None:
        """Keeps the last `size` bytes of frames of all ports in memory, for save()."""
        self._flight = Recorder(size, keep_last=True)
        for i, port in enumerate(self.ports):
            lib.sim_port_capture(port.dev, self._flight.c, i)

    def recorded(self) -> list[Frame]:
        """The frames that record() kept; they leave the recorder."""
        return self._flight.read() if self._flight is not None else []

    def save(self, path: str | Path) -> Path:
        """Writes what record() kept."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pcapng(path, self.recorded(), [p.name for p in self.ports])
        return path

    @contextmanager
    def explain_failure(self, path: str | Path) -> Iterator[None]:
        """With it, an exception carries the seed and the path of a pcapng file of the last frames."""
        self.record()
        try:
            yield
        except BaseException as e:
            e.add_note(f"simulation: seed {self.seed}, at {self.now_ns()} ns, frames in {self.save(path)}")
            raise

    # ---- end
    def leaks(self) -> dict[str, int]:
        """What is still in use, by place and kind; empty after an orderly end."""
        found: dict[str, int] = {}
        for stack in self._stacks.values():
            found |= {f"{stack.name}: {k}": v for k, v in stack.core.audit().items() if v}
        for port in self.ports:
            s = port.stats()
            found |= {f"{port.name}: {k}": v for k in ("misuse",) if (v := getattr(s, k))}
        return found

    def close(self) -> None:
        """Ends everything at once: what is open is reset. SimulationError: frames were left or misused."""
        if not self.c:
            return
        for capture in list(self._captures):
            capture.close()
        with self.lock:
            for stack in list(self._stacks.values()):
                stack.destroy()
        left = {
            f"{p.name}: {kind}": n
            for p in self.ports
            for kind, n in (("frames held", p.stats().held), ("misuse", p.stats().misuse))
            if n
        }
        self._ended_ns = self.now_ns()
        lib.sim_destroy(self.c)
        self.c = None
        for port in self.ports:
            port.closed()
        if left:
            raise SimulationError(f"left behind (seed {self.seed}): {left}")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc: object) -> None:
        try:
            self.close()
        except (SimulationError, BufferError):
            if exc_type is None:  # else the first error is the one to see
                raise
