# SPDX-License-Identifier: Apache-2.0
"""How tools find brokers and ask them. The other end is admin.py."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bypass.broker import look
from bypass.broker.protocol import MAX_BYTES, socket_address, socket_name
from bypass.errors import BypassError
from bypass.observe import Application

PRIVATE = "@bypass/run/"
ANSWER_S = 30.0
LOOK_S = look.TIME_S + 5.0
LOOK_BYTES = 1 << 28


def brokers(name: str | None = None) -> list[str]:
    """The sockets of the brokers that can be asked: of this name, or the usual one and every private one."""
    if name is not None:
        return [name]
    there, usual = listening(), socket_name()
    return ([usual] if usual in there else []) + sorted(n for n in there if n.startswith(PRIVATE))


def listening() -> set[str]:
    """Names of Unix sockets of this network namespace that somebody listens at; anybody may."""
    return {
        line.rpartition(" ")[2]
        for line in Path("/proc/thread-self/net/unix").read_text().splitlines()
        if " 00010000 " in line  # __SO_ACCEPTCON: it listens
    }


def owner_of(sock: socket.socket) -> int:
    """The user who listens at the other end."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


class Asking:
    """A connection to a broker.

    Raises:
        BypassError: none runs there.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._sock.connect(socket_address(name))
        except OSError as e:
            self._sock.close()
            raise BypassError(
                f"no broker runs at {name} ({e.strerror}): start one by `bypass up -c POLICY`, or name its socket"
            ) from e
        self._require_believed()

    def _require_believed(self) -> None:
        """BypassError: anybody may listen at an abstract name, and this is neither root's nor ours. Root asks all."""
        owner = owner_of(self._sock)
        if self.name.startswith("@") and owner != 0 and os.geteuid() not in (0, owner):
            self._sock.close()
            raise BypassError(f"{self.name} is user {owner}'s, neither root's nor yours: it is not asked")

    def close(self) -> None:
        self._sock.close()

    def ask(
        self, question: dict[str, Any], wait_s: float = ANSWER_S, *, idle: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The records of the answer, up to the last one.

        Args:
            idle: an empty record whenever the broker says nothing for wait_s; else that is an error.

        Raises:
            BypassError: the broker refuses, has ended, or says nothing for so many seconds.
        """
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended
            self._sock.send(json.dumps(question).encode())
        while True:
            if not select.select([self._sock], [], [], wait_s)[0]:
                if idle:
                    yield {}
                    continue
                raise BypassError(f"the broker at {self.name} does not answer")
            data = b""
            with suppress(ConnectionResetError):  # without having read the question
                data = self._sock.recv(MAX_BYTES)
            if not data:
                raise BypassError(f"the broker at {self.name} has ended")
            record: dict[str, Any] = json.loads(data)
            if "error" in record:
                raise BypassError(str(record["error"]))
            yield record
            if record.get("end"):
                return

    def conns(self) -> list[Application]:
        """The applications that the broker lets this user see.

        Raises:
            BypassError: the broker refuses, does not know the question, or tells nonsense.
        """
        self._sock.send(json.dumps({"do": "conns"}).encode())
        if not select.select([self._sock], [], [], ANSWER_S)[0]:
            raise BypassError(f"the broker at {self.name} does not answer")
        data, fds, _, _ = socket.recv_fds(self._sock, MAX_BYTES, 1)
        try:
            answer = Answer.model_validate_json(data)
            if answer.error:
                raise BypassError(answer.error)
            return _applications(fds[0], answer.apps) if fds else []
        except ValidationError as e:
            raise BypassError(f"the broker at {self.name} tells nonsense: {e.errors()[0]['msg']}") from e
        finally:
            for fd in fds:
                os.close(fd)

    def wait_for_end(self, seconds: float = ANSWER_S) -> None:
        """Until the broker has closed the connection, which is the last thing that it does."""
        end = time.monotonic() + seconds
        while select.select([self._sock], [], [], max(0.0, end - time.monotonic()))[0]:
            try:
                if not self._sock.recv(MAX_BYTES):
                    return
            except ConnectionResetError:
                return
        raise BypassError(f"the broker at {self.name} has not ended within {seconds:.0f} seconds")


class Answer(BaseModel):
    """To `conns`; what else it means comes through the pipe that is passed with it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    end: bool = False
    apps: int = 0
    error: str = ""


def _applications(pipe: int, count: int) -> list[Application]:
    """What bypass.broker.look tells. BypassError, ValidationError: it is not that."""
    end, data = time.monotonic() + LOOK_S, bytearray()
    while part := _read(pipe, end):
        data += part
        if len(data) > LOOK_BYTES:
            raise BypassError("the broker tells of more than any application holds")
    lines = data.splitlines()
    if not lines or lines.pop() != look.END.encode() or len(lines) != count:
        raise BypassError("the broker's reader has ended early: try again")
    return [Application.model_validate_json(line) for line in lines]


def _read(pipe: int, end: float) -> bytes:
    if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
        raise BypassError(f"the broker's reader has not ended within {LOOK_S:.0f} seconds")
    return os.read(pipe, 1 << 20)


def ask(name: str, question: dict[str, Any], wait_s: float = ANSWER_S) -> list[dict[str, Any]]:
    """All records of an answer. BypassError: there is none."""
    asking = Asking(name)
    try:
        return list(asking.ask(question, wait_s))
    finally:
        asking.close()
