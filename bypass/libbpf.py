# SPDX-License-Identifier: Apache-2.0
"""The calls of libbpf (1.1 or later, a dependency of bcc) that steering needs, over ctypes.

What lives here: maps, programs, links and test runs as thin classes around file descriptors. What does not: what is
in the maps (`steering.py`), how programs are compiled (`bpf/build.py`). Read first: bpf(2) and bpf/bpf.h of libbpf.

Every class here owns its file descriptor and gives it back in `close()`. Failing calls raise OSError with the
kernel's errno; the caller knows what it means.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from bypass import procfs

MAP_HASH, MAP_ARRAY, MAP_PERCPU_ARRAY, MAP_XSKMAP = 1, 2, 6, 17  # enum bpf_map_type
PROG_SCHED_CLS, PROG_XDP = 3, 6  # enum bpf_prog_type
ATTACH_XDP, ATTACH_TCX_EGRESS = 37, 47  # enum bpf_attach_type
XDP_SKB_MODE, XDP_DRV_MODE = 1 << 1, 1 << 2  # XDP_FLAGS_* of linux/if_link.h
ANY, NOEXIST, EXIST = 0, 1, 2  # flags of map updates

_U32 = struct.Struct("=I")
_LOG_BYTES = 1 << 20


class _LinkCreateOpts(ctypes.Structure):
    _fields_ = (("sz", ctypes.c_size_t), ("flags", ctypes.c_uint32), ("pad", ctypes.c_uint32))


class _ProgLoadOpts(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_uint32),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
        ("attach_btf_obj_fd", ctypes.c_uint32),
        ("fd_array", ctypes.c_void_p),
        ("func_info", ctypes.c_void_p),
        ("func_info_cnt", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("line_info", ctypes.c_void_p),
        ("line_info_cnt", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_char_p),
    )


class _TestRunOpts(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_char_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


class _XdpQueryOpts(ctypes.Structure):
    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("prog_id", ctypes.c_uint32),
        ("drv_prog_id", ctypes.c_uint32),
        ("hw_prog_id", ctypes.c_uint32),
        ("skb_prog_id", ctypes.c_uint32),
        ("attach_mode", ctypes.c_uint8),
    )


class _XdpMd(ctypes.Structure):
    """struct xdp_md; data and data_end are offsets here, data_meta is 0."""

    _fields_ = tuple(
        (name, ctypes.c_uint32)
        for name in ("data", "data_end", "data_meta", "ingress_ifindex", "rx_queue_index", "egress_ifindex")
    )


@functools.cache
def _lib() -> ctypes.CDLL:
    return ctypes.CDLL("libbpf.so.1", use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno() or -result
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


@functools.cache
def possible_cpus() -> int:
    """CPUs that per-CPU maps hold values for."""
    return _check(_lib().libbpf_num_possible_cpus(), "possible CPUs")


class _Owned:
    """A file descriptor and its one owner."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Gives the descriptor back. Again: nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Map(_Owned):
    """A BPF map with keys and values of fixed size, as bytes.

    Args:
        kind: MAP_*.
        name: at most 15 characters, as `bpftool map` shows it.
        key_size, value_size: bytes.
        entries: capacity.
        fd: of a map of this kind that there is already; the map's from here on. -1: it is made.
    """

    def __init__(
        self, kind: int, name: str, key_size: int, value_size: int, entries: int, fd: int = -1
    ) -> None:
        if fd < 0:
            args = (kind, name.encode()[:15], key_size, value_size, entries)
            fd = _check(_lib().bpf_map_create(*args, None), f"creating map {name}")
        super().__init__(fd)
        self.name, self.key_size, self.value_size, self.entries = name, key_size, value_size, entries
        self.per_cpu = kind == MAP_PERCPU_ARRAY
        self._room = -(-value_size // 8) * 8 * possible_cpus() if self.per_cpu else value_size

    def get(self, key: bytes) -> bytes | None:
        """The value, or None. Of a per-CPU map: all CPUs' values, each padded to 8 bytes."""
        value = ctypes.create_string_buffer(self._room)
        if _lib().bpf_map_lookup_elem(self.fd, key, value) < 0:
            return None
        return value.raw

    def put(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Sets a value. `flags`: ANY, NOEXIST, EXIST. A per-CPU map takes all CPUs' values."""
        _check(
            _lib().bpf_map_update_elem(self.fd, key, value, ctypes.c_uint64(flags)), f"updating {self.name}"
        )

    def delete(self, key: bytes) -> bool:
        """Removes a key; False when it was not there."""
        return bool(_lib().bpf_map_delete_elem(self.fd, key) >= 0)

    def keys(self) -> Iterator[bytes]:
        """All keys. The map may change meanwhile, but not lose the key that was given last."""
        key = ctypes.create_string_buffer(self.key_size)
        last: bytes | None = None
        while _lib().bpf_map_get_next_key(self.fd, last, key) >= 0:
            last = key.raw
            yield last

    def put_all(self, keys: bytes, values: bytes) -> None:
        """Sets many keys, one system call for all; keys and values lie one behind the other."""
        count = ctypes.c_uint32(len(keys) // self.key_size)
        if count.value:
            result = _lib().bpf_map_update_batch(self.fd, keys, values, ctypes.byref(count), None)
            _check(result, f"updating {self.name}")

    def all_values(self) -> bytes:
        """The values of an array map, one behind the other (per-CPU maps as in `get`)."""
        values = ctypes.create_string_buffer(self._room * self.entries)
        keys = ctypes.create_string_buffer(self.key_size * self.entries)
        count, cursor = ctypes.c_uint32(self.entries), ctypes.c_uint32()
        result = _lib().bpf_map_lookup_batch(
            self.fd, None, ctypes.byref(cursor), keys, values, ctypes.byref(count), None
        )
        _check(result, f"reading {self.name}")
        return values.raw


class ProgRun(NamedTuple):
    """What a test run of a program gave."""

    result: int  # the program's return value
    data: bytes  # the frame afterwards
    meta: bytes  # the metadata in front of it
    duration_ns: int  # mean of a repetition


class Prog(_Owned):
    """A loaded program.

    Args:
        kind: PROG_*.
        name: at most 15 characters.
        code: instructions with map file descriptors filled in.
        attach_type: what it is going to be attached as, where the kernel wants to know before.
        log: receives the verifier's log when the kernel refuses the program.

    Raises:
        OSError: the verifier refuses it, or a capability is missing.
    """

    def __init__(self, kind: int, name: str, code: bytes, attach_type: int, log: list[str]) -> None:
        opts = _ProgLoadOpts(sz=ctypes.sizeof(_ProgLoadOpts), expected_attach_type=attach_type)
        args = (kind, name.encode()[:15], b"Dual BSD/GPL", code, ctypes.c_size_t(len(code) // 8))
        fd = _lib().bpf_prog_load(*args, ctypes.byref(opts))
        if fd < 0:
            code_of_refusal = ctypes.get_errno()
            text = ctypes.create_string_buffer(_LOG_BYTES)
            opts.log_level, opts.log_size = 1, _LOG_BYTES
            opts.log_buf = ctypes.cast(text, ctypes.c_char_p)
            fd = _lib().bpf_prog_load(*args, ctypes.byref(opts))
            if fd < 0:
                log.append(text.value.decode(errors="replace"))
                raise OSError(code_of_refusal, f"loading {name}: {os.strerror(code_of_refusal)}")
        super().__init__(fd)
        self.name = name

    def run_xdp(
        self, frame: bytes, *, meta: bytes = b"", ifindex: int = 0, rx_queue: int = 0, repeat: int = 1
    ) -> ProgRun:
        """Runs an XDP program on a frame of 14 bytes or more without sending it anywhere (BPF_PROG_TEST_RUN).

        Args:
            meta: metadata in front of the frame, a multiple of 4 bytes.
            ifindex: the interface it claims to come from; 0: the loopback, which has queue 0 only.
        """
        data = meta + frame
        before = _XdpMd(len(meta), len(data), 0, ifindex, rx_queue, 0)
        after = _XdpMd()
        out = ctypes.create_string_buffer(len(data) + 256)
        opts = _TestRunOpts(
            sz=ctypes.sizeof(_TestRunOpts),
            data_in=data,
            data_out=ctypes.addressof(out),
            data_size_in=len(data),
            data_size_out=len(out),
            ctx_in=ctypes.addressof(before),
            ctx_out=ctypes.addressof(after),
            ctx_size_in=ctypes.sizeof(before),
            ctx_size_out=ctypes.sizeof(after),
            repeat=repeat,
        )
        _check(_lib().bpf_prog_test_run_opts(self.fd, ctypes.byref(opts)), "test run")
        result = out.raw[: opts.data_size_out]
        return ProgRun(opts.retval, result[after.data :], result[: after.data], opts.duration)

    def run_skb(self, frame: bytes) -> int:
        """Runs a tc program on a frame of 14 bytes or more that claims to leave by the loopback; its return value."""
        opts = _TestRunOpts(sz=ctypes.sizeof(_TestRunOpts), data_in=frame, data_size_in=len(frame), repeat=1)
        _check(_lib().bpf_prog_test_run_opts(self.fd, ctypes.byref(opts)), "test run")
        return ctypes.c_int32(opts.retval).value


def _last_fd() -> int:
    """A descriptor number above all others of this process.

    When a process dies, the kernel releases its files from the highest number down (close_files() queues them as
    task work, which runs last in, first out). The link has to go before AF_XDP sockets do: each of those waits for
    two RCU grace periods, tens of milliseconds in which packets would still be redirected to nobody.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(soft, 4096) - 8 if soft != resource.RLIM_INFINITY else 4088


class Link(_Owned):
    """A program attached to an interface for as long as this descriptor is open in some process.

    Args:
        prog: what to attach.
        ifindex: where.
        attach_type: ATTACH_*.
        flags: XDP_*_MODE for XDP, else 0.
    """

    def __init__(self, prog: Prog, ifindex: int, attach_type: int, flags: int = 0) -> None:
        opts = _LinkCreateOpts(sz=ctypes.sizeof(_LinkCreateOpts), flags=flags)
        args = (prog.fd, ifindex, attach_type, ctypes.byref(opts))
        self._keep(_check(_lib().bpf_link_create(*args), f"attaching {prog.name}"))

    def _keep(self, low: int) -> None:
        try:
            super().__init__(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _last_fd()))
        finally:
            os.close(low)

    @classmethod
    def of(cls, fd: int) -> Self:
        """A link that somebody made; the descriptor is the link's from here on."""
        link = cls.__new__(cls)
        link._keep(fd)
        return link

    def update(self, prog: Prog) -> None:
        """Exchanges the program. Every packet meets the old one or the new one."""
        _check(_lib().bpf_link_update(self.fd, prog.fd, None), f"exchanging {prog.name}")


class XdpAttached(NamedTuple):
    """The XDP program of an interface."""

    prog_id: int
    mode: str  # native, skb, offload
    name: str
    pids: tuple[
        int, ...
    ]  # processes that hold it or its link open; empty: attached by netlink, or not visible


def xdp_attached(ifindex: int) -> XdpAttached | None:
    """The XDP program on an interface, ours or another's; None: there is none."""
    opts = _XdpQueryOpts(sz=ctypes.sizeof(_XdpQueryOpts))
    _check(_lib().bpf_xdp_query(ifindex, 0, ctypes.byref(opts)), "asking for the XDP program")
    for number, mode in (
        (opts.drv_prog_id, "native"),
        (opts.skb_prog_id, "skb"),
        (opts.hw_prog_id, "offload"),
    ):
        if number:
            return XdpAttached(number, mode, _prog_name(number), tuple(sorted(_holders(number))))
    return None


def _prog_name(number: int) -> str:
    fd = _lib().bpf_prog_get_fd_by_id(number)
    if fd < 0:
        return "?"
    info = ctypes.create_string_buffer(256)
    size = ctypes.c_uint32(len(info))
    result = _lib().bpf_obj_get_info_by_fd(fd, info, ctypes.byref(size))
    os.close(fd)
    name_at = 64  # struct bpf_prog_info
    return "?" if result < 0 else info.raw[name_at : name_at + 16].split(b"\0")[0].decode() or "?"


def _holders(prog_id: int) -> Iterator[int]:
    """Processes with a descriptor of this program or of a link to it (both show `prog_id:` in fdinfo)."""
    for pid in procfs.pids():
        if any(_shows(f, prog_id) for f in _files(procfs.PROC / str(pid) / "fdinfo")):
            yield pid


def _files(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # the process ended, or is not ours to see
        return []


def _shows(fdinfo: Path, prog_id: int) -> bool:
    try:
        return f"prog_id:\t{prog_id}\n".encode() in fdinfo.read_bytes()
    except OSError:
        return False


def wait_for_programs() -> None:
    """Returns when every program that ran at the call has ended, so that what it counted can be read.

    membarrier(2), MEMBARRIER_CMD_GLOBAL: waits for an RCU grace period, and programs run inside one. Refused on
    kernels booted with nohz_full; then what is read may miss packets in flight.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    number: Any = {"x86_64": 324, "aarch64": 283}.get(os.uname().machine)
    if number is not None:
        libc.syscall(number, 1, 0, 0)
