# SPDX-License-Identifier: Apache-2.0
"""Linux as the peer of a bypass process: both ends in a lab, packet loss between them, and a look at the wire."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

from backends import policy_for
from support import WAIT_S

from bypass import netns
from bypass.lab import CLIENT_IFNAME, SERVER_IFNAME, SERVER_IP, Lab

TESTS = Path(__file__).parent
SERVER_PORT = 8080
POLICY = """\
version: 1
interface: bypass0
backend: {kind: afxdp, mode: auto}
flows:
  - {name: web, match: {proto: tcp, local: 192.0.2.10, local_port: 8080}, action: steer}
  - {name: echo, match: {proto: udp, local: 192.0.2.10, local_port: 7}, action: steer}
  - {name: out, match: {proto: tcp, local: 192.0.2.10, remote: 192.0.2.20, remote_port: 8000}, action: steer}
"""


class Peer:
    """A bypass process (tests/peer_server.py) in the server's namespace of a lab."""

    def __init__(self, lab: Lab, folder: Path, policy: str = POLICY) -> None:
        self.lab = lab
        self.folder = folder
        path = folder / "policy.yaml"
        path.write_text(policy_for(lab, policy))
        argv = [sys.executable, str(TESTS / "peer_server.py"), str(path), str(folder)]
        self.process = subprocess.Popen(
            lab.command("server", argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == {"ready": True}

    def do(self, what: str, **args: Any) -> dict[str, Any]:
        """One command; its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **args}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the bypass process ended with {self.process.wait(10)}"
        loaded: dict[str, Any] = json.loads(line)
        return loaded

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            code = self.process.wait(20)
            assert code == 0, f"the bypass process ended with {code}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.close()
        finally:
            if self.process.poll() is None:
                self.kill()
            for stream in (self.process.stdin, self.process.stdout):
                assert stream is not None
                stream.close()


def curl(lab: Lab, *args: str, timeout_s: int = 120) -> subprocess.CompletedProcess[bytes]:
    """curl in the client's namespace; fails the test when curl does."""
    argv = ["curl", "--silent", "--show-error", "--fail", "--max-time", str(timeout_s), *args]
    done = subprocess.run(lab.command("client", argv), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done


def client_socket(lab: Lab, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A kernel socket of the client's namespace."""
    made = netns.run(lab.client_ns, socket.socket, socket.AF_INET, kind)
    made.settimeout(WAIT_S)
    return made


def server_socket(lab: Lab, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A kernel socket of the server's namespace."""
    made = netns.run(lab.server_ns, socket.socket, socket.AF_INET, kind)
    made.settimeout(WAIT_S)
    return made


# ---- The wire, as the client sees it -------------------------------------------------------------------------------
class Sniffer:
    """Collects the TCP resets that reach the client's interface."""

    def __init__(self, lab: Lab) -> None:
        self.resets: list[tuple[int, int]] = []  # source port, destination port
        self._socket = netns.run(
            lab.client_ns, socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self._socket.bind((CLIENT_IFNAME, 0x0800))
        self._socket.settimeout(0.1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                frame = self._socket.recv(2048)
                ip = frame[14:]
                if ip[9] == 6 and ip[12:16] == socket.inet_aton(SERVER_IP):
                    tcp = ip[(ip[0] & 15) * 4 :]
                    if tcp[13] & 4:
                        self.resets.append(struct.unpack("!HH", tcp[:4]))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        time.sleep(0.2)  # what is on the way
        self._stop.set()
        self._thread.join()
        self._socket.close()


def _sum16(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def tcp_segment(
    src: tuple[str, int], dst: tuple[str, int], seq: int, ack: int, flags: int, data: bytes = b""
) -> bytes:
    """A TCP segment with a right checksum (RFC 9293 3.1)."""
    head = struct.pack(
        "!HHIIBBHHH", src[1], dst[1], seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 5 << 4, flags, 65535, 0, 0
    )
    pseudo = (
        socket.inet_aton(src[0]) + socket.inet_aton(dst[0]) + struct.pack("!BBH", 0, 6, len(head) + len(data))
    )
    check = _sum16(pseudo + head + data)
    return head[:16] + struct.pack("!H", check) + head[18:] + data


def ip_packets(src: str, dst: str, payload: bytes, pieces: int = 1, ident: int = 1) -> list[bytes]:
    """The IPv4 packet of a TCP segment, or its fragments (RFC 791)."""
    step = (len(payload) // pieces + 7) // 8 * 8 if pieces > 1 else len(payload)  # fragments come in eights
    packets = []
    for start in range(0, len(payload), step):
        part = payload[start : start + step]
        more = start + step < len(payload)
        head = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 20 + len(part), ident, (0x2000 if more else 0) | start // 8, 64, 6, 0,
            socket.inet_aton(src), socket.inet_aton(dst),
        )  # fmt: skip
        packets.append(head[:10] + struct.pack("!H", _sum16(head)) + head[12:] + part)
    return packets


class Thrower:
    """Sends packets of its own making from the client's interface."""

    def __init__(self, lab: Lab) -> None:
        mac = netns.run(lab.server_ns, _mac_of, SERVER_IFNAME)
        own = netns.run(lab.client_ns, _mac_of, CLIENT_IFNAME)
        self._head = mac + own + b"\x08\x00"
        self._socket = netns.run(lab.client_ns, socket.socket, socket.AF_PACKET, socket.SOCK_RAW)
        self._socket.bind((CLIENT_IFNAME, 0))

    def throw(self, packets: list[bytes]) -> None:
        for packet in packets:
            self._socket.send(self._head + packet)

    def close(self) -> None:
        self._socket.close()


def _mac_of(ifname: str) -> bytes:
    # not /sys: that is the test process's own namespace's
    with socket.socket() as s:
        answer: bytes = fcntl.ioctl(s, 0x8927, struct.pack("16s16x", ifname.encode()))  # SIOCGIFHWADDR
    return answer[18:24]
