# SPDX-License-Identifier: Apache-2.0
"""Recorded frames: the recorder of the C side, and pcapng files that Wireshark and tcpdump read.

Every place where frames are seen is an interface of the file. Times are nanoseconds; a packet's comment tells what
the simulated wire did to it. Format: IETF draft-ietf-opsawg-pcapng, written by dpkt.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from bypass._core import ffi, lib

__all__ = ["DeviceCapture", "Frame", "PcapngWriter", "Recorder", "write_pcapng"]

RECORD = struct.Struct("=QIIHHI")  # struct capture_record
FATES = {
    lib.CAPTURE_LOST: "lost",
    lib.CAPTURE_DUPLICATED: "duplicated",
    lib.CAPTURE_CORRUPTED: "corrupted on the way",
    lib.CAPTURE_REORDERED: "held back",
    lib.CAPTURE_QUEUE_DROPPED: "dropped: queue full",
    lib.CAPTURE_OVERSIZE: "dropped: larger than the MTU",
    lib.CAPTURE_DOWN: "dropped: no carrier",
    lib.CAPTURE_NO_FRAME: "dropped: receiver out of frames",
}
FLAG_INBOUND, FLAG_OUTBOUND = 1, 2  # epb_flags, bits 0-1
OPT_COMMENT, OPT_NAME, OPT_FLAGS, OPT_TSRESOL = 1, 2, 2, 9


@dataclass(frozen=True, slots=True)
class Frame:
    """A recorded frame.

    Attributes:
        time_ns: of the recorder's clock.
        interface: number of the place where it was seen.
        flags: lib.CAPTURE_RX or CAPTURE_TX, and what became of it.
        length: bytes of the frame, of which `data` holds the first.
    """

    time_ns: int
    interface: int
    flags: int
    length: int
    data: bytes

    @property
    def sent(self) -> bool:
        return bool(self.flags & lib.CAPTURE_TX)

    @property
    def fate(self) -> str:
        """What the wire did to it, in words; empty: nothing."""
        return ", ".join(text for bit, text in FATES.items() if self.flags & bit)


def _frames(raw: bytes) -> Iterator[Frame]:
    at = 0
    while at < len(raw):
        time_ns, captured, length, interface, flags, _ = RECORD.unpack_from(raw, at)
        at += RECORD.size
        yield Frame(time_ns, interface, flags, length, raw[at : at + captured])
        at += (captured + 7) // 8 * 8


class Recorder:
    """Memory that records frames; C fills it, `read` empties it.

    Args:
        size: bytes of memory.
        snap_len: bytes kept of each frame, 0: all.
        keep_last: True: the oldest frames make room (a flight recorder); False: frames that find no room are
            dropped and counted.

    Raises:
        MemoryError: size bytes are not to be had.
    """

    READ_BYTES = 1 << 20

    def __init__(self, size: int = 8 << 20, *, snap_len: int = 0, keep_last: bool = False) -> None:
        self.c: Any = lib.capture_create(size, snap_len, keep_last)
        if not self.c:
            raise MemoryError(f"no memory for a recorder of {size} bytes")
        self.c = ffi.gc(self.c, lib.capture_destroy, size)
        self._buffer: Any = ffi.new("uint8_t[]", self.READ_BYTES)

    def read(self) -> list[Frame]:
        """All recorded frames, oldest first; they leave the recorder."""
        frames: list[Frame] = []
        while n := lib.capture_read(self.c, self._buffer, self.READ_BYTES):
            frames += _frames(ffi.buffer(self._buffer, n)[:])
        return frames

    @property
    def dropped(self) -> int:
        """Frames that made room for newer ones, or found none."""
        return int(lib.capture_dropped(self.c))


class PcapngWriter:
    """A pcapng file with one interface for each name; `offset_ns` is added to times (to get Unix time)."""

    def __init__(self, file: BinaryIO, interfaces: Iterable[str], offset_ns: int = 0) -> None:
        from dpkt import pcapng

        self._ng = pcapng
        self._offset_ns = offset_ns
        # if_tsresol 9: times are nanoseconds
        options = (
            [
                pcapng.PcapngOptionLE(code=OPT_NAME, data=name.encode()),
                pcapng.PcapngOptionLE(code=OPT_TSRESOL, data=b"\x09"),
                pcapng.PcapngOptionLE(),
            ]
            for name in interfaces
        )
        idbs = [pcapng.InterfaceDescriptionBlockLE(snaplen=0, linktype=1, opts=o) for o in options]
        self._writer = pcapng.Writer(file, idb=idbs)

    def write(self, frame: Frame) -> None:
        direction = FLAG_OUTBOUND if frame.sent else FLAG_INBOUND
        option = self._ng.PcapngOptionLE
        options = [option(code=OPT_FLAGS, data=direction.to_bytes(4, "little"))]
        if frame.fate:
            options.append(option(code=OPT_COMMENT, text=frame.fate))
        options.append(option())
        t = frame.time_ns + self._offset_ns
        self._writer.writepkt(
            self._ng.EnhancedPacketBlockLE(
                iface_id=frame.interface,
                ts_high=t >> 32,
                ts_low=t & 0xFFFFFFFF,
                caplen=len(frame.data),
                pkt_len=frame.length,
                pkt_data=frame.data,
                opts=options,
            )
        )


class DeviceCapture:
    """A device of any backend, recorded to a pcapng file: what tcpdump would show, where it sees nothing (AF_XDP).

    Args:
        lower: `struct bypass_netdev *`, which has to outlive this.
        path: the file; it is complete after close().
        name: of the interface in the file.
        offset_ns: Unix time minus the clock of now().
        size: bytes of memory; frames that come faster than flush() is called are dropped and counted.

    Attributes:
        dev: the device for the stack.
    """

    def __init__(
        self, lower: Any, path: str | Path, name: str, offset_ns: int = 0, size: int = 8 << 20
    ) -> None:
        self._recorder = Recorder(size)
        self.dev: Any = lib.capture_dev_create(lower, self._recorder.c, 0)
        if not self.dev:
            raise MemoryError("no memory for a recording device")
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._writer = PcapngWriter(self._file, [name], offset_ns)

    def now(self, now_ns: int) -> None:
        """The time of the frames that pass from now on."""
        lib.capture_dev_now(self.dev, now_ns)

    def flush(self) -> None:
        """Writes what was recorded."""
        for frame in self._recorder.read():
            self._writer.write(frame)

    @property
    def dropped(self) -> int:
        """Frames that are not in the file."""
        return self._recorder.dropped

    def close(self) -> None:
        """After the stack has ended. A second call does nothing."""
        if not self._file.closed:
            self.flush()
            self._file.close()
            lib.capture_dev_destroy(self.dev)


def write_pcapng(
    path: str | Path, frames: Iterable[Frame], interfaces: Iterable[str], offset_ns: int = 0
) -> None:
    """Writes a pcapng file. `interfaces`: names, in the order of Frame.interface."""
    with open(path, "wb") as file:
        writer = PcapngWriter(file, interfaces, offset_ns)
        for frame in frames:
            writer.write(frame)
