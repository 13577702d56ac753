# SPDX-License-Identifier: Apache-2.0
"""The AF_XDP device: one UMEM and a socket on each queue of an interface, as a netdev for the stack.

What lives here: opening with clear errors, what it became (mode, descriptors), statistics, audit, closing. Packets
never pass through here: the stack drives the device in C (bypass/afxdp/afxdp.h). What steers packets into the
sockets is `bypass.steering`.

Source: Documentation/networking/af_xdp.rst of the kernel.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from bypass._core import ffi, lib
from bypass.afxdp.who import queue_holders
from bypass.errors import BypassError, DeviceError, PrivilegeError, QueueBusyError
from bypass.offloop import off_loop

if TYPE_CHECKING:
    from bypass.hwflow.inforce import InForce

__all__ = ["AfxdpDevice", "Audit", "Memory", "Mode", "interface_queues"]

Mode = Literal["auto", "copy", "zerocopy", "skb"]

KERNEL_HEADROOM = 256  # bytes in front of a received packet (XDP_PACKET_HEADROOM)
ETH_HEADER = 14
MODES: dict[str, int] = {
    "copy": lib.AFXDP_COPY,
    "zerocopy": lib.AFXDP_ZEROCOPY,
    "skb": lib.AFXDP_COPY,  # generic XDP hands out copies whatever the socket says
}
OPTIONS = {46: "SO_BUSY_POLL", 69: "SO_PREFER_BUSY_POLL", 70: "SO_BUSY_POLL_BUDGET"}  # asm-generic/socket.h
STEPS: dict[int, str] = {
    lib.AFXDP_STEP_SOCKET: "creating an AF_XDP socket",
    lib.AFXDP_STEP_UMEM: "registering packet memory",
    lib.AFXDP_STEP_RING: "creating a ring",
    lib.AFXDP_STEP_MAP: "mapping a ring",
    lib.AFXDP_STEP_BIND: "binding",
    lib.AFXDP_STEP_POLL: "making the descriptor to sleep on",
}


@dataclass(frozen=True, slots=True)
class Audit:
    """Where every frame is; the places add up to `frames`.

    Attributes:
        free: in the pool.
        stack: held by the stack (or another caller) only.
        tx: with the device for transmission only. stack_tx: also held by the stack, until it is acknowledged.
        rx: with the device for reception.
        misplaced: in no place, or in two. Always 0, or there is a bug.
        bad_free: times a frame was freed by somebody who did not hold it. Always 0, or there is a bug.
        conserved: whether all counts agree with each other.
    """

    frames: int
    free: int
    stack: int
    tx: int
    stack_tx: int
    rx: int
    misplaced: int
    bad_free: int
    conserved: bool


class Memory(Protocol):
    """Where a device lies."""

    def map(self, size: int) -> Any:
        """A pointer to so many zeroed bytes, at a page. OSError: there are none."""

    def unmap(self) -> None:
        """Nobody uses it any more."""


class OwnMemory:
    """A memory file of the device's own.

    Attributes:
        fd: its descriptor.
    """

    def __init__(self) -> None:
        self.fd = -1
        self._mem: Any = None
        self._size = 0

    def map(self, size: int) -> Any:
        fd = ffi.new("int *", -1)
        self._mem = lib.afxdp_mem_map(size, fd)
        if self._mem == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self.fd, self._size = int(fd[0]), size
        return self._mem

    def unmap(self) -> None:
        lib.afxdp_mem_unmap(self._mem, self._size, self.fd)
        self._mem, self.fd = None, -1


def interface_queues(ifname: str) -> int:
    """Receive queues that an interface has now, in the network namespace of the calling thread.

    Raises:
        DeviceError: no such interface.
    """
    count = int(lib.afxdp_interface_queues(ifname.encode()))
    if count == -errno.EOPNOTSUPP:
        return _netlink_queues(ifname)
    if count < 0:
        _raise_for_interface(ifname, -count)
    return max(count, 1)


@off_loop
def _netlink_queues(ifname: str) -> int:
    """For drivers that answer no channel query: the queues that netlink knows."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        links = ip.link("get", ifname=ifname)
    return int(links[0].get("num_rx_queues") or 1)


def _raise_for_interface(ifname: str, err: int) -> None:
    if err in (errno.ENODEV, errno.ENXIO):
        names = ", ".join(name for _, name in socket.if_nameindex())
        raise DeviceError(f"no interface {ifname!r} in this network namespace; there are: {names}")
    raise DeviceError(f"interface {ifname!r}: {os.strerror(err)}")


def _struct(pointer: Any) -> dict[str, int]:
    """A C struct of numbers as a dict, in the order of its declaration."""
    return {name: int(getattr(pointer, name)) for name, _ in ffi.typeof(pointer).item.fields}


class AfxdpDevice:
    """All given queues of an interface, open. A context manager; `close()` ends it.

    Sockets are made in the network namespace of the calling thread. Nothing arrives before the sockets are in the
    XSKMAP of an attached XDP program (`bypass.steering`); detach that program before closing.

    Attributes:
        mode: 'copy' or 'zerocopy', as the kernel says. `mode_reason` says why, in words.
        xdp_mode: how the XDP program has to be attached, 'native' or 'skb'.
        queue_numbers: the queues, in the order of their indices.
        fds: queue number -> AF_XDP socket.
        hardware: what the interface does of the policy by rules of its own; set by who puts them on it.

    Args:
        ifname: the interface.
        queues: 'all', or queue numbers. meta.queue of a frame is an index into `queue_numbers`.
        mode: 'zerocopy' fails where the driver cannot; 'skb' is copy mode below a generic XDP program; 'auto' takes
            what `bypass.doctor` advises.
        ring_size: entries of each ring of a queue, a power of two.
        frames: frames of packet memory, all queues together; None: 4 * ring_size for each queue.
        frame_size: bytes of a frame, 2048 or 4096. What does not fit (frame_size - 256 bytes with the Ethernet
            header) is dropped by the kernel and counted in `rx_dropped`.
        fill_size: entries of fill and completion rings; None: ring_size.
        fill_target: frames kept with the device for reception, per queue; None: as many as rings and half of the
            frames allow.
        rx_csum_trust: take received TCP and UDP checksums as right. For veth peers that leave them to hardware
            that is not there; a switched-off check elsewhere lets corruption through.
        bind_wait_s: how long to retry a busy queue, seconds: the kernel closes AF_XDP sockets asynchronously.
        memory: where the device lies, for who hands it over; None: in memory of its own.
        busy_poll_us, busy_poll_budget, prefer_busy_poll: SO_BUSY_POLL (microseconds), SO_BUSY_POLL_BUDGET
            (packets), SO_PREFER_BUSY_POLL. Off by default.

    Raises:
        DeviceError: no such interface or queue, a busy queue (says who has it), no zero-copy, or a configuration
            that makes no sense.
        PrivilegeError: a capability or more locked memory is needed.
    """

    def __init__(
        self,
        ifname: str,
        *,
        queues: Literal["all"] | Sequence[int] = "all",
        mode: Mode = "auto",
        ring_size: int = 2048,
        frames: int | None = None,
        frame_size: int = 2048,
        fill_size: int | None = None,
        fill_target: int | None = None,
        rx_csum_trust: bool = False,
        bind_wait_s: float = 2.0,
        busy_poll_us: int = 0,
        busy_poll_budget: int = 0,
        prefer_busy_poll: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self.hardware: InForce | None = None
        self._dev: Any = None
        self._memory: Memory = memory if memory is not None else OwnMemory()
        if mode not in ("auto", *MODES):
            raise DeviceError(f"mode {mode!r}: it is one of auto, {', '.join(MODES)}")
        self.ifname = ifname
        self.requested_mode: Mode = mode
        self._all_queues = queues == "all"
        available = interface_queues(ifname)
        self._ifindex = socket.if_nametoindex(ifname)
        self.queue_numbers: tuple[int, ...] = self._queue_numbers(queues, available)
        frames = frames if frames is not None else 4 * ring_size * len(self.queue_numbers)
        self._config = ffi.new(
            "struct afxdp_config *",
            {
                "ifname": ifname.encode(),
                "flags": (lib.AFXDP_F_RX_CSUM_TRUST if rx_csum_trust else 0)
                | (lib.AFXDP_F_PREFER_BUSY_POLL if prefer_busy_poll else 0),
                "queue_count": len(self.queue_numbers),
                "queues": list(self.queue_numbers),
                "frames": frames,
                "frame_size": frame_size,
                "ring_size": ring_size,
                "fill_size": fill_size or 0,
                "fill_target": fill_target or 0,
                "bind_wait_ms": round(bind_wait_s * 1000),
                "busy_poll_us": busy_poll_us,
                "busy_poll_budget": busy_poll_budget,
            },
        )
        self._size = int(lib.afxdp_mem_size(self._config))
        if self._size == 0:
            raise DeviceError(self._config_problem())
        self._open()

    def _queue_numbers(self, queues: Literal["all"] | Sequence[int], available: int) -> tuple[int, ...]:
        numbers = tuple(range(available)) if queues == "all" else tuple(int(q) for q in queues)
        limit = int(lib.AFXDP_MAX_QUEUES)
        if not numbers or len(set(numbers)) != len(numbers):
            raise DeviceError(f"queues {list(numbers)}: at least one, and each only once")
        if len(numbers) > limit:
            raise DeviceError(
                f"{self.ifname} has {len(numbers)} queues and at most {limit} can be served: "
                f"ethtool -L {self.ifname} combined {limit}"
            )
        wrong = [q for q in numbers if not 0 <= q < available]
        if wrong:
            last = available - 1
            raise DeviceError(f"{self.ifname} has no queue {wrong[0]}: it has queues 0 to {last}")
        return numbers

    # ---- Opening -----------------------------------------------------------------------------------------------
    def _open(self) -> None:
        """Opens in the mode that was asked for, or that the doctor advises, and reads back what it became."""
        from bypass.doctor import (
            choose_mode,
        )  # knows all of the machine; most programs need no more than this

        wanted, self.mode_reason = choose_mode(self.ifname, self.requested_mode)
        self.xdp_mode: Literal["native", "skb"] = "skb" if wanted == "skb" else "native"
        optional = self.requested_mode == "auto" and wanted == "zerocopy"
        error = self._try(lib.AFXDP_AUTO if optional else MODES[wanted])
        if error is not None and optional and error.err != errno.EBUSY:
            # Sockets of one UMEM share its mode: the first queue went zero-copy, and another could not.
            self.mode_reason = f"zero-copy failed on queue {error.queue} ({os.strerror(error.err)})"
            error = self._try(lib.AFXDP_COPY)
        if error is not None:
            raise self._explain(error)
        zerocopy = int(lib.afxdp_zerocopy(self._dev))
        if zerocopy < 0:
            self.close()
            raise DeviceError(f"{self.ifname}: the mode cannot be read back: {os.strerror(-zerocopy)}")
        self.mode: Literal["copy", "zerocopy"] = "zerocopy" if zerocopy else "copy"
        if optional and not zerocopy and "failed" not in self.mode_reason:
            self.mode_reason = "the driver offers zero-copy and refused it: the kernel fell back to copies"
        self.fds: dict[int, int] = {
            number: int(lib.afxdp_fd(self._dev, index)) for index, number in enumerate(self.queue_numbers)
        }

    def _try(self, c_mode: int) -> Any:
        """Opens the device. None: it is open; else the struct afxdp_error."""
        try:
            mem = self._memory.map(self._size)
        except BypassError:
            raise
        except OSError as e:
            mib = self._size >> 20
            raise DeviceError(
                f"{self.ifname}: no {mib} MiB of packet memory ({e.strerror}): ask for fewer frames"
            ) from e
        self._config.mode = c_mode
        error = ffi.new("struct afxdp_error *")
        dev = lib.afxdp_open(self._config, mem, self._size, error)
        if dev == ffi.NULL:
            self._memory.unmap()
            return error
        self._dev = dev
        return None

    def _config_problem(self) -> str:
        c = self._config
        return (
            f"{self.ifname}: these sizes do not fit together: ring_size {c.ring_size} and fill_size "
            f"{c.fill_size or c.ring_size} have to be powers of two, frame_size {c.frame_size} 2048 or 4096, and "
            f"{c.frames} frames more than what {c.queue_count} queues keep for reception (at least 16 each): "
            f"try frames={4 * c.ring_size * c.queue_count}"
        )

    def _explain(self, error: Any) -> BypassError:
        """The exception for a failure to open."""
        err, step = int(error.err), int(error.step)
        what = f"{self.ifname}, queue {error.queue}" if error.queue >= 0 else self.ifname
        doing = STEPS.get(step, "opening")
        if step == lib.AFXDP_STEP_OPTION:
            doing = f"setting {OPTIONS.get(error.option, error.option)}"
        text = f"{what}: {doing} failed: {os.strerror(err)}"
        if err in (errno.EPERM, errno.EACCES):
            need = "CAP_NET_ADMIN" if step == lib.AFXDP_STEP_OPTION else "CAP_NET_RAW"
            return PrivilegeError(f"{text}: run as root, or with {need}")
        if step == lib.AFXDP_STEP_SOCKET and err == errno.EAFNOSUPPORT:
            return DeviceError(f"{text}: this kernel has no AF_XDP (CONFIG_XDP_SOCKETS)")
        if step == lib.AFXDP_STEP_UMEM and err in (errno.ENOBUFS, errno.ENOMEM):
            return self._explain_memory(text)
        if step == lib.AFXDP_STEP_BIND:
            return self._explain_bind(text, err, int(error.queue))
        if step in (lib.AFXDP_STEP_INTERFACE, lib.AFXDP_STEP_CONFIG):
            return DeviceError(f"{self.ifname}: {os.strerror(err)}")
        return DeviceError(text)

    def _explain_memory(self, text: str) -> BypassError:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        need = self._config.frames * self._config.frame_size
        have = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
        return PrivilegeError(
            f"{text}: {need >> 10} KiB have to be locked and the limit is {have}: ulimit -l {need >> 10}, "
            f"CAP_IPC_LOCK, or fewer frames"
        )

    def _explain_bind(self, text: str, err: int, queue: int) -> BypassError:
        if err == errno.EBUSY:
            return QueueBusyError(f"{text}: {self._busy_with(queue)}")
        if err == errno.EOPNOTSUPP and self.requested_mode == "zerocopy":
            return DeviceError(
                f"{text}: the driver of {self.ifname} has no zero-copy AF_XDP on this queue: use mode 'auto' or 'copy'"
            )
        if err == errno.EINVAL:
            return DeviceError(
                f"{text}: no such queue any more, or frames of {self._config.frame_size} bytes do not hold what the "
                f"driver receives with this MTU (try frame_size 4096)"
            )
        if err in (errno.ENODEV, errno.ENXIO):
            return DeviceError(f"{text}: the interface is gone")
        return DeviceError(text)

    def _busy_with(self, queue: int) -> str:
        holders = queue_holders(self._ifindex, queue)
        names = ", ".join("this process" if h.pid == os.getpid() else str(h) for h in holders)
        if not names:
            return "another AF_XDP socket has it, and no process to blame is visible"
        if holders[0].certain:
            return f"{names} has it"
        return f"another AF_XDP socket has it (this kernel does not tell whose; AF_XDP is used by {names})"

    # ---- Using -------------------------------------------------------------------------------------------------
    @property
    def closed(self) -> bool:
        return self._dev is None

    def _live(self) -> Any:
        if self._dev is None:
            raise DeviceError(f"the AF_XDP device of {self.ifname} is closed")
        return self._dev

    @property
    def netdev(self) -> Any:
        """The cffi `struct bypass_netdev *` for the stack. Valid until `close()`."""
        return lib.afxdp_netdev(self._live())

    @property
    def mac(self) -> str:
        """The interface's MAC address, with colons."""
        return ":".join(f"{b:02x}" for b in self.netdev.mac)

    @property
    def mtu(self) -> int:
        """The largest IP packet, bytes: the interface's MTU, or what a frame holds where that is less."""
        return int(self.netdev.mtu)

    @property
    def memfd(self) -> int:
        """The descriptor of state, metadata and packet memory together, of a device in memory of its own."""
        self._live()
        assert isinstance(self._memory, OwnMemory)
        return self._memory.fd

    def health(self) -> int:
        """0 when usable; errno.ENETDOWN while the interface is down (it recovers by itself); errno.ENXIO when it
        was deleted. Also takes over a changed MTU or MAC address.

        Ask when netlink says that something changed: poll() on the sockets stays silent when an interface goes.
        """
        return -int(lib.afxdp_health(self._live()))

    def queues_now(self) -> int:
        """Receive queues that the interface has by now. Packets of those that were not opened cannot be taken."""
        count = int(lib.afxdp_queues_now(self._live()))
        return count if count > 0 else len(self.queue_numbers)  # a driver that cannot tell, or is gone

    def take_new_queues(self) -> dict[int, int]:
        """Opens the queues that the interface has got since (`ethtool -L`), where all were asked for. There are never
        fewer: the kernel refuses to take away a queue with an AF_XDP socket.

        Returns:
            The sockets of the new queues by queue number, for the XSKMAP; `fds` and `queue_numbers` have them too.

        Raises:
            DeviceError: one cannot be opened; those before it are, and the device goes on as before.
        """
        before = len(self.queue_numbers)
        error = ffi.new("struct afxdp_error *")
        now = self.queues_now() if self._all_queues else 0
        for number in range(before, now):
            index = int(lib.afxdp_add_queue(self._live(), number, now, error))
            if index == -errno.ENOSPC:
                raise DeviceError(
                    f"{self.ifname} has got a queue {number}, for which {self._config.frames} frames are too few, or "
                    f"it is one more than {lib.AFXDP_MAX_QUEUES}: its packets cannot be taken. Open the device anew"
                )
            if index < 0:
                raise self._explain(error)
            self.queue_numbers += (number,)
            self.fds[number] = int(lib.afxdp_fd(self._live(), index))
        return {number: self.fds[number] for number in self.queue_numbers[before:]}

    def more_socket(self, number: int, of: int, first: int) -> int:
        """A socket of a queue that the interface has got since it was handed over, where all were asked for. Those who
        use the device take it (`afxdp_take_queue()` of afxdp.h).

        Args:
            of: how many queues there are going to be.
            first: the socket of the first queue.

        Returns:
            The socket, bound, which is the caller's.

        Raises:
            DeviceError: it cannot be opened, is busy, or the device has too few frames for so many.
        """
        wanted = ffi.new("struct afxdp_config *", self._config[0])
        if of <= lib.AFXDP_MAX_QUEUES:
            wanted.queue_count, wanted.queues = of, list(range(of))
        if of > lib.AFXDP_MAX_QUEUES or not lib.afxdp_mem_size(wanted):
            raise DeviceError(
                f"{self.ifname} has got a queue {number}, for which {wanted.frames} frames are too few, or it is one "
                f"more than {lib.AFXDP_MAX_QUEUES}: its packets cannot be taken. Start the program anew"
            )
        error = ffi.new("struct afxdp_error *")
        fd = int(lib.afxdp_more_socket(self._config, number, first, error))
        if fd < 0:
            raise self._explain(error)
        return fd

    # ---- Looking -----------------------------------------------------------------------------------------------
    def statistics(self) -> dict[int, dict[str, int]]:
        """Counters since opening, by queue number: ours (`struct afxdp_counters`), then the kernel's six of
        XDP_STATISTICS (`rx_dropped`, `rx_invalid_descs`, `tx_invalid_descs`, `rx_ring_full`,
        `rx_fill_ring_empty_descs`, `tx_ring_empty_descs`). Packets, bytes or events each.
        """
        dev = self._live()
        ours, kernel = ffi.new("struct afxdp_counters *"), ffi.new("struct afxdp_kernel_stats *")
        result = {}
        for index, number in enumerate(self.queue_numbers):
            lib.afxdp_counters(dev, index, ours)
            err = lib.afxdp_kernel_stats(dev, index, kernel)
            if err < 0:
                raise DeviceError(f"{self.ifname}, queue {number}: XDP_STATISTICS: {os.strerror(-err)}")
            result[number] = _struct(ours) | _struct(kernel)
        return result

    def audit(self) -> Audit:
        """Counts every frame by where it is. Walks all frames: for tests and tools."""
        out = ffi.new("struct frame_audit *")
        conserved = lib.afxdp_audit(self._live(), out) == 0
        return Audit(**_struct(out), conserved=conserved)

    # ---- Benchmarks --------------------------------------------------------------------------------------------
    def echo(
        self, seconds: float, *, port: int = 0, spin: bool = False, max_packets: int = 0
    ) -> dict[str, int]:
        """Answers packets ring to ring without any stack: the yardstick of benchmarks. UDP comes back with addresses
        and ports swapped; TCP gets a stateless responder (a SYN is accepted, data is acknowledged and sent back, FIN
        is answered) that ordinary clients can connect to where no packet is lost. Nothing else may use the device
        meanwhile. Other threads run.

        Args:
            seconds: how long; call again to go on.
            port: answer this TCP and UDP port only, recycle the rest; 0: all.
            spin: never sleep.
            max_packets: return after this many answers; 0: no limit.

        Returns:
            `packets` and `bytes` answered, `ignored`, `polls` (sleeps), `kicks` (system calls to send), `tx_stalls`.

        Raises:
            DeviceError: frames are under transmission, the interface is down or gone, or completions do not come.
        """
        flags = lib.AFXDP_ECHO_SPIN if spin else 0
        args = ffi.new("struct afxdp_echo_args *", [round(seconds * 1e9), max_packets, flags, port])
        out = ffi.new("struct afxdp_echo_result *")
        err = int(lib.afxdp_echo(self._live(), args, out))
        if err < 0:
            raise DeviceError(f"{self.ifname}: echo: {os.strerror(-err)}")
        return _struct(out)

    # ---- Closing -----------------------------------------------------------------------------------------------
    def close(self, wait_s: float = 0.2) -> int:
        """Waits up to wait_s seconds for transmissions to complete, then closes in any case. Idempotent.

        Returns:
            Frames whose transmission the kernel had not completed.
        """
        if self._dev is None:
            return 0
        dev, self._dev = self._dev, None
        self.fds = {}
        left = int(lib.afxdp_close(dev, round(wait_s * 1000)))
        self._memory.unmap()
        return left

    def hand_over(self) -> dict[int, int]:
        """Ends this view of the device, which goes on: its state is in the memory, its sockets are the caller's.

        Returns:
            Descriptors by queue number, in the order of their indices.
        """
        fds = {queue: os.dup(fd) for queue, fd in self.fds.items()}
        dev, self._dev = self._live(), None
        self.fds = {}
        lib.afxdp_detach(dev)
        self._memory.unmap()
        return fds

    def __enter__(self) -> AfxdpDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_dev", None) is not None and not sys.is_finalizing():
            self.close(0)
