# SPDX-License-Identifier: Apache-2.0
"""A program with sockets of the ordinary kind, which does what its standard input says: tests/test_broker_takeover.py.

listen HOST PORT: echoes there; says the port.
connect HOST PORT: connects, keeps the connection, and says its local port.
again: an echo on each of these; says how many came back whole.
close PORT: closes a listener.
fork: a child that does nothing; says its process number.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from contextlib import suppress

listeners: dict[int, socket.socket] = {}
kept: list[socket.socket] = []


def echo(sock: socket.socket) -> None:
    with sock, suppress(ConnectionResetError):
        while data := sock.recv(65536):
            sock.sendall(data)


def serve(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()


def said(what: str, *args: str) -> object:
    if what == "listen":
        port = int(args[1])
        listeners[port] = socket.create_server((args[0], port), backlog=64)
        threading.Thread(target=serve, args=(listeners[port],), daemon=True).start()
        return port
    if what == "close":
        listeners[int(args[0])].shutdown(socket.SHUT_RDWR)
        listeners.pop(int(args[0])).close()
        return "closed"
    if what == "fork":
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            signal.pause()
        return pid
    if what == "connect":
        kept.append(socket.create_connection((args[0], int(args[1])), 10))
        return kept[-1].getsockname()[1]
    whole = 0
    for sock in kept:
        sock.settimeout(None)
        sock.sendall(b"x" * 3000)
        whole += sock.recv(3000, socket.MSG_WAITALL) == b"x" * 3000
    return whole


for line in sys.stdin:
    print(said(*line.split()), flush=True)
