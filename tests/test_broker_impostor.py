# SPDX-License-Identifier: Apache-2.0
"""Somebody else listens at the broker's abstract name while no broker does: nobody tells him anything."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from broker_support import WAIT_S, new_name
from preloaded import CLEAN, LIBRARY

from bypass.broker.protocol import socket_address
from bypass.broker.tools import Asking
from bypass.errors import BypassError

ALICE, CAROL = 64734, 64732  # nobody else on this machine is one of them
PROGRAM = """
import socket
s = socket.create_server(("127.0.0.1", 0))
c = socket.create_connection(s.getsockname())
a, _ = s.accept()
c.sendall(b"by the kernel")
print(a.recv(100).decode(), flush=True)
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")


class Impostor:
    """A process of that user, which listens. heard(): what the next who connects says until it is gone."""

    def __init__(self, name: str, uid: int) -> None:
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(WAIT_S)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._ours.close()
                os.setresuid(uid, uid, uid)
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                listener.bind(socket_address(name))
                listener.listen()
                theirs.send(b"listens")
                while True:
                    with listener.accept()[0] as sock:
                        theirs.send(b"%d bytes" % len(sock.recv(1 << 16)))
            finally:
                os._exit(1)
        theirs.close()
        assert self._ours.recv(100) == b"listens"

    def heard(self) -> str:
        return self._ours.recv(100).decode()

    def close(self) -> None:
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        self._ours.close()


@contextmanager
def impostor(name: str, uid: int) -> Iterator[Impostor]:
    it = Impostor(name, uid)
    try:
        yield it
    finally:
        it.close()


def run_as(uid: int, name: str) -> subprocess.CompletedProcess[str]:
    env = CLEAN | {"LD_PRELOAD": str(LIBRARY), "BYPASS_SOCKET": name}
    return subprocess.run(
        ["/usr/bin/python3", "-c", PROGRAM],
        env=env, user=uid, capture_output=True, text=True, timeout=WAIT_S, check=False,
    )  # fmt: skip


def test_a_program_says_nothing_to_another_users_broker() -> None:
    name = new_name()
    with impostor(name, CAROL) as carol:
        done = run_as(ALICE, name)
        assert (done.returncode, done.stdout) == (0, "by the kernel\n"), done.stderr
        assert carol.heard() == "0 bytes"


def test_a_program_speaks_with_its_own_users_broker() -> None:
    """The control: what is not said above is said here."""
    name = new_name()
    with impostor(name, ALICE) as broker:
        done = run_as(ALICE, name)
        assert (done.returncode, done.stdout) == (0, "by the kernel\n"), done.stderr
        assert broker.heard() != "0 bytes"


def test_tools_do_not_ask_another_users_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    name = new_name()
    with impostor(name, CAROL) as carol:
        Asking(name).close()  # root may ask everybody
        assert carol.heard() == "0 bytes"
        monkeypatch.setattr(os, "geteuid", lambda: ALICE)
        with pytest.raises(BypassError, match=f"{name} is user {CAROL}'s, neither root's nor yours"):
            Asking(name)
        assert carol.heard() == "0 bytes"
