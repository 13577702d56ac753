# SPDX-License-Identifier: Apache-2.0
"""Everything that bypass-fwd can be told: the messages of `fwd.h`, one method each.

What does not live here: when what is told (the broker), and what bypass-fwd does with it (the C files of this folder).

Descriptors that are passed stay the caller's: bypass-fwd gets duplicates. Those that come back (`get`) are the caller's
to close.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Interface
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bypass._core import ffi, lib
from bypass.fwd.connection import Connection
from bypass.fwd.program import connect, start
from bypass.fwd.records import (
    REFUSALS,
    Doorbells,
    ForwarderError,
    Item,
    Lease,
    Listed,
    address,
    device_info,
    fields,
    item_name,
    lease_values,
)

_DEATH_S = 2.0  # of a process that has closed its sockets
QUIT_S = 10.0


class Forwarder(Connection):
    """A connection to bypass-fwd, and all that it can be told. One thread at a time.

    Failing requests raise OSError with the errno and the text that bypass-fwd answers.

    Args:
        sock: connected; this object's from here on.
        broker: as the broker, which may change things; else only `list`, `stats` and `port_stats` are answered.

    Attributes:
        pid: of bypass-fwd. It is a child of who called `start()`, who may wait for it if it goes on after `close()`.
        queues: that it had sockets of when this connection began; 0: no interface is open.
    """

    def __init__(self, sock: socket.socket, *, broker: bool = True) -> None:
        super().__init__(sock)
        self._child = 0  # 0: not ours
        self._goes_on = False  # after this connection
        self._ends = -1  # tells the end of one that is not ours
        try:
            answer = self._ask(
                "HELLO", "struct fwd_hello", {"abi": lib.FWD_ABI, "flags": lib.FWD_BROKER if broker else 0}
            )
        except BaseException:
            sock.close()
            raise
        self.pid: int = answer.pid
        self.queues: int = answer.device
        self._ends = os.pidfd_open(self.pid)

    @classmethod
    def start(
        cls,
        listen: str | None = None,
        *,
        hold: bool = False,
        spin_us: int | None = None,
        cpu: int | None = None,
        program: Path | None = None,
    ) -> Self:
        """Starts one, in the network namespace of the calling thread.

        Args:
            listen: where a successor connects: an absolute path, or @name. Without it bypass-fwd ends with us.
            hold: without us it goes on until all processes of its last item are dead.
            spin_us: how long it polls before it sleeps.
            cpu: where it runs.

        Raises:
            ForwarderError: it ended at once; stderr has said why.
        """
        ours, child = start(listen, hold=hold, spin_us=spin_us, cpu=cpu, program=program)
        try:
            self = cls(ours)
        except ForwarderError:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            raise ForwarderError(f"bypass-fwd ended with exit code {code}") from None
        self._child, self._goes_on = child, listen is not None or hold
        return self

    @classmethod
    def connect(cls, name: str, *, broker: bool = True) -> Self:
        """To one that listens there.

        Raises:
            ForwarderError: nobody does, or somebody else.
            OSError: EBUSY: another broker is connected.
        """
        return cls(connect(name), broker=broker)

    def _named(self, kind: str, name: str, **more: Any) -> Any:
        return self._ask(kind, "struct fwd_name", {"name": item_name(name)}, **more)

    # ---- The store -------------------------------------------------------------------------------------------------
    def put(self, name: str, blob: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Puts an item in, or replaces bytes and descriptors of one: at most 4096 bytes and 128 descriptors."""
        if len(blob) > lib.FWD_BLOB or len(fds) > lib.FWD_FDS:
            raise ValueError(f"item {name}: at most {lib.FWD_BLOB} bytes and {lib.FWD_FDS} descriptors")
        values = {"name": item_name(name), "len": len(blob), "blob": blob}
        size = ffi.offsetof("struct fwd_item", "blob") + len(blob)
        self._ask("PUT", "struct fwd_item", values, size=size, fds=fds)

    def get(self, name: str) -> Item:
        """Duplicates of its descriptors. FileNotFoundError: there is none."""
        fds: list[int] = []
        item = self._named("GET", name, answer="struct fwd_item", back=fds)
        return Item(bytes(ffi.buffer(item.blob, item.len)), fds)

    def list(self) -> list[Listed]:
        """All items, in the order in which they were put in first."""
        found: list[Listed] = []
        size = ffi.offsetof("struct fwd_list", "item")
        while True:
            answer = self._ask("LIST", "struct fwd_list", {"from": len(found)}, size=size)
            for i in range(answer.count):
                one = answer.item[i]
                found.append(Listed(ffi.string(one.name).decode(), one.len, one.fds, one.pids, one.keys))
            if answer.count < lib.FWD_LIST_MAX:
                return found

    def delete(self, name: str) -> None:
        """The item, its watch and its ports."""
        self._named("DELETE", name)

    # ---- Watches ---------------------------------------------------------------------------------------------------
    def watch(self, name: str, pidfds: Sequence[int]) -> None:
        """More processes of an item: when all are dead, its keys, its ports and the item itself go."""
        self._named("WATCH", name, fds=pidfds)

    def watch_keys(self, name: str, which: int, keys: Sequence[bytes], map_fd: int | None = None) -> None:
        """Keys to delete when its processes are dead.

        Args:
            which: a number below 8 for the map, as the caller likes.
            keys: all of one size.
            map_fd: the map; needed once for each `which`.
        """
        self._keys("WATCH_KEYS", name, which, keys, [] if map_fd is None else [map_fd])

    def forget_keys(self, name: str, which: int, keys: Sequence[bytes]) -> None:
        """The opposite, for keys that were deleted in order."""
        self._keys("FORGET_KEYS", name, which, keys, [])

    def _keys(self, kind: str, name: str, which: int, keys: Sequence[bytes], fds: Sequence[int]) -> None:
        size = len(keys[0])
        step = lib.FWD_KEYS_BYTES // size
        for i in range(0, len(keys), step):
            part = b"".join(keys[i : i + step])
            values = {
                "name": item_name(name),
                "map": which,
                "key_size": size,
                "count": len(part) // size,
                "keys": part,
            }
            length = ffi.offsetof("struct fwd_keys", "keys") + len(part)
            self._ask(kind, "struct fwd_keys", values, size=length, fds=fds)
            fds = []

    def unwatch(self, name: str) -> None:
        self._named("UNWATCH", name)

    def watched(self, name: str) -> Sequence[int]:
        """Pidfds of the item's processes that are alive, the caller's to close."""
        found: list[int] = []
        while True:
            values = {"name": item_name(name), "from": len(found)}
            answer = self._ask("WATCHED", "struct fwd_watched", values, back=found)
            if answer.count < lib.FWD_FDS:
                return found

    # ---- Shared mode -----------------------------------------------------------------------------------------------
    def device_open(self, config: Mapping[str, Any], map_fd: int, slot: int = 0) -> dict[str, Any]:
        """Opens the interface's AF_XDP sockets there, and puts them into an XSKMAP at slot + queue.

        Args:
            config: the fields of `struct afxdp_config`; queue_count follows from queues.

        Returns:
            {"mac": 6 bytes, "mtu", "queues", "caps", "zerocopy"}: of the device.
        """
        config = {"queue_count": len(config["queues"]), **config, "ifname": config["ifname"].encode()}
        a = self._ask(
            "DEVICE_OPEN",
            "struct fwd_device",
            {"cfg": config, "slot": slot},
            answer="struct fwd_device_info",
            fds=[map_fd],
        )
        return device_info(a)

    def dpdk_open(
        self,
        config: Mapping[str, Any],
        args: Sequence[str],
        classifier: int,
        tap: int,
        *,
        vlan: int = 0,
        rate: int = 10_000,
    ) -> dict[str, Any]:
        """Starts DPDK there and opens a port.

        Args:
            config: the fields of `struct dpdk_config`.
            args: of EAL, the program's name first.
            classifier: the memory that says whose packets are, sealed against shrinking.
            tap: descriptor of the TAP device through which the kernel gets the rest.
            vlan: the tag that all frames of applications have on the wire; 0: none.
            rate: packets a second that the kernel gets at most.

        Returns:
            As device_open(), and "driver".
        """
        words = b"".join(arg.encode() + b"\0" for arg in args)
        if len(words) > lib.FWD_ARGS:
            raise OSError(
                errno.E2BIG, f"DPDK's arguments have {len(words)} bytes, of {lib.FWD_ARGS}: {' '.join(args)}"
            )
        values = {"cfg": dict(config), "vlan": vlan, "exception_rate": rate, "argc": len(args), "args": words}
        size = ffi.offsetof("struct fwd_dpdk", "args") + len(words)
        a = self._ask(
            "DPDK_OPEN",
            "struct fwd_dpdk",
            values,
            answer="struct fwd_device_info",
            size=size,
            fds=[classifier, tap],
        )
        return device_info(a) | {"driver": ffi.string(a.driver).decode()}

    def dpdk_flows(self, flows: Any, rest: int) -> tuple[int, str] | None:
        """Rules for the hardware of the DPDK port, in place of those before.

        Args:
            flows: `struct dpdk_flow[]`.
            rest: the queue of what none matches; -1: as the port hashes.

        Returns:
            None; or the number of the rule that the port refuses, and why: then none is in force.
        """
        file = os.memfd_create("bypass-flows", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(file), "wb") as out:
                out.write(ffi.buffer(flows))
            values = {"count": len(flows), "rest": rest}
            a = self._ask(
                "DPDK_FLOWS", "struct fwd_flows", values, answer="struct fwd_flows_done", fds=[file]
            )
        finally:
            os.close(file)
        return (int(a.at), ffi.string(a.text).decode(errors="replace")) if a.err else None

    def device_close(self) -> None:
        self._ask("DEVICE_CLOSE")

    def locals(self, addresses: Iterable[IPv4Interface | str]) -> None:
        """All IPv4 addresses of the host, with their prefix: what applications may send from."""
        nets = [IPv4Interface(a) for a in addresses]
        entries = [{"addr": {"b": address(str(n.ip))}, "prefix_len": n.network.prefixlen} for n in nets]
        size = ffi.offsetof("struct fwd_locals", "local") + len(nets) * ffi.sizeof("struct fwd_local")
        self._ask("LOCALS", "struct fwd_locals", {"count": len(nets), "local": entries}, size=size)

    def port_add(
        self,
        app: int,
        memory: int,
        offset: int,
        config: Any,
        doorbells: Doorbells,
        *,
        item: str = "",
        allow: int = 0,
    ) -> None:
        """An application's port.

        Args:
            app: its number, not 0.
            memory: the file, sealed against shrinking.
            offset: of the port in it; `port_init()` was called there with
            config: `struct port_config *`.
            item: whose death is the port's; "": nobody's.
            allow: FWD_ALLOW_*.
        """
        values = {"app": app, "allow": allow, "mem_off": offset, "cfg": config[0], "item": item.encode()}
        fds = [memory, doorbells.to_fwd, doorbells.fwd]
        self._ask("PORT_ADD", "struct fwd_port_add", values, fds=fds)

    def port_del(self, app: int) -> None:
        self._ask("PORT_DEL", "struct fwd_app", {"app": app})

    def lease_add(self, lease: Lease) -> None:
        """From now on its application may send from there, and nobody else."""
        self._ask("LEASE_ADD", "struct fwd_lease", lease_values(lease))

    def lease_del(self, lease: Lease) -> None:
        self._ask("LEASE_DEL", "struct fwd_lease", lease_values(lease))

    def entry(self, entry: int, app: int) -> None:
        """Frames whose verdict names this live entry are that application's; app 0: nobody's."""
        self._ask("ENTRY", "struct fwd_entry", {"entry": entry, "app": app})

    def rate(
        self, app: int, *, bytes_: int = 0, bytes_burst: int = 0, packets: int = 0, packets_burst: int = 0
    ) -> None:
        """What it may send a second, and at once after a pause; 0: no limit."""
        values = {"app": app, "bytes": bytes_, "bytes_burst": bytes_burst}
        values |= {"packets": packets, "packets_burst": packets_burst}
        self._ask("RATE", "struct fwd_rate", values)

    def spin(self, spin_us: int, cpu: int = -1) -> None:
        """How long it polls before it sleeps, and the CPU it runs on (-1: any)."""
        self._ask("SPIN", "struct fwd_spin", {"spin_us": spin_us, "cpu": cpu})

    def look(self) -> None:
        """It looks at the interface at once: link, MTU, queues. It does so every second unasked."""
        self._ask("LOOK")

    # ---- Looking ---------------------------------------------------------------------------------------------------
    def stats(self) -> dict[str, int]:
        """The fields of `struct fwd_stats`."""
        return fields(self._ask("STATS", answer="struct fwd_stats"))

    def dpdk_stats(self, queue: int) -> dict[str, dict[str, int]]:
        """Counters of a DPDK port: "queue" (of that queue), "port" (the driver's), "filter" (by verdict), "kernel" (the
        exception path); "link": whether it is up, and its speed (0: unknown)."""
        a = self._ask("DPDK_STATS", "struct fwd_app", {"app": queue}, answer="struct fwd_dpdk_stats")
        found = {name: fields(getattr(a, name)) for name in ("queue", "port", "filter", "kernel")}
        speed = a.about.speed_mbps
        found["link"] = {"up": a.about.link_up, "speed_mbps": speed if speed < 0xFFFFFFFF else 0}
        return found

    def dpdk_xstats(self) -> dict[str, int]:
        """All that the driver of the DPDK port counts, by its own names. Empty: nothing, or the port was removed."""
        found: dict[str, int] = {}
        size = ffi.offsetof("struct fwd_dpdk_xstats", "xstat")
        asked = 0
        while True:
            a = self._ask("DPDK_XSTATS", "struct fwd_dpdk_xstats", {"from": asked}, size=size)
            asked += a.count
            for x in a.xstat[0 : a.count]:
                found[ffi.string(x.name).decode(errors="replace")] = int(x.value)
            if a.count < lib.FWD_LIST_MAX:
                return found

    def dpdk_audit(self) -> dict[str, int]:
        """Where each frame of a DPDK port is: the fields of `struct frame_audit`; "misplaced" has to be 0."""
        return fields(self._ask("DPDK_AUDIT", answer="struct fwd_dpdk_audit").frames)

    def dpdk_wake(self) -> str:
        """What wakes bypass-fwd when something comes to its DPDK port, such as "interrupts"."""
        a = self._ask("DPDK_STATS", "struct fwd_app", {"app": 0}, answer="struct fwd_dpdk_stats")
        return str(ffi.string(a.about.wake).decode())

    def port_stats(self, app: int) -> dict[str, Any]:
        """The fields of `struct fwd_port_stats`; "refused": {reason: frames}, those that happened."""
        a = self._ask("PORT_STATS", "struct fwd_app", {"app": app}, answer="struct fwd_port_stats")
        refused = {REFUSALS[i]: n for i, n in enumerate(list(a.refused)[1:]) if n}
        return {**fields(a), "refused": refused}

    # ---- The end ---------------------------------------------------------------------------------------------------
    def quit(self) -> None:
        """Ends bypass-fwd: everything that only it holds closes and detaches. Waits until it has.

        Raises:
            ForwarderError: it has ended already.
        """
        try:
            self._ask("QUIT")
        except ForwarderError:
            self._reap()
            raise
        self._goes_on = False
        if self._ends >= 0:
            select.select([self._ends], [], [], QUIT_S)
        self.close()

    def _reap(self) -> None:
        """Waits for a child that has ended by itself: a killed one closes its sockets a moment before it is dead."""
        if self._child and select.select([self._ends], [], [], _DEATH_S)[0]:
            os.waitpid(self._child, 0)
            self._child = 0

    def close(self) -> None:
        """Ends the connection; bypass-fwd goes on if it listens, else it ends, and is waited for if we started it."""
        self._sock.close()
        if self._child and not self._goes_on:
            os.waitpid(self._child, 0)
            self._child = 0
        if self._ends >= 0:
            os.close(self._ends)
            self._ends = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
