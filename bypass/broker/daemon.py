# SPDX-License-Identifier: Apache-2.0
"""A broker that runs until it is told to end: `bypass up`. In the foreground, in the background, or by systemd.

Source: sd_listen_fds(3), sd_notify(3): a socket in place of our own as descriptor 3, and states told on NOTIFY_SOCKET.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from bypass.broker.private import site_when_free
from bypass.broker.protocol import name_of
from bypass.broker.server import Server, listen
from bypass.broker.site import Site
from bypass.errors import BypassError

log = logging.getLogger("bypass.broker")

FIRST_FD = 3  # SD_LISTEN_FDS_START


def passed_socket(environ: Mapping[str, str]) -> socket.socket | None:
    """The socket that systemd listens on for us; None: there is none.

    Raises:
        BypassError: it is of another type than the unit should say.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()) or environ.get("LISTEN_FDS") in (None, "0"):
        return None
    if environ["LISTEN_FDS"] != "1":
        raise BypassError(
            f"{environ['LISTEN_FDS']} sockets were passed: the unit has one ListenSequentialPacket="
        )
    os.set_inheritable(FIRST_FD, False)
    sock = socket.socket(fileno=FIRST_FD)
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        sock.detach()
        raise BypassError(
            "the socket that was passed is of another type: the unit says ListenSequentialPacket="
        )
    return sock


def notify(environ: Mapping[str, str], *states: str) -> None:
    """Tells systemd, where it wants to know."""
    name = environ.get("NOTIFY_SOCKET")
    if not name:
        return
    address = "\0" + name[1:] if name.startswith("@") else name
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto("\n".join(states).encode(), address)


def monotonic_usec() -> str:
    return f"MONOTONIC_USEC={time.monotonic_ns() // 1000}"


def serve(make_site: Callable[[str], Site], name: str, ready: Callable[[], None]) -> None:
    """Runs a broker until SIGTERM, SIGINT or `bypass down`.

    Args:
        make_site: makes what it serves, by the name of its socket.
        name: where it listens, unless a socket was passed.
        ready: called when it serves.

    Raises:
        BypassError: it cannot begin, or had to end by itself.
    """
    environ = dict(os.environ)
    passed = passed_socket(environ)
    sock = passed if passed is not None else listen(name)
    try:
        site = site_when_free(lambda: make_site(name_of(sock)))
    except BaseException:
        sock.close()
        if passed is None and not name.startswith("@"):
            os.unlink(name)
        raise
    with Server(site, sock, "" if passed is not None or name.startswith("@") else name) as server:

        def reloaded(answer: dict[str, Any]) -> None:
            if "error" in answer:
                log.error("%s", answer["error"])
            else:
                log.warning(
                    "%s: %d rules, %d leases revoked", answer["policy"], answer["rules"], answer["revoked"]
                )
            notify(environ, "READY=1")

        def reload() -> None:
            notify(environ, "RELOADING=1", monotonic_usec())
            try:
                server.admin.reload(site.policy_path, reloaded)
            except BypassError as e:
                reloaded({"error": str(e)})

        server.on_signal({signal.SIGTERM: server.stop, signal.SIGINT: server.stop, signal.SIGHUP: reload})
        notify(environ, "READY=1", f"STATUS=serves {site.ifname}")
        ready()
        server.run()
        notify(environ, "STOPPING=1")
        failure = server.broker.failure
    if failure:
        raise BypassError(failure)  # for systemd's Restart=on-failure


def in_background(make_site: Callable[[str], Site], name: str) -> int:
    """Starts a broker that outlives the caller. Its process number; it is ready.

    Raises:
        BypassError: with the broker's own words.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            os.setsid()
            if os.fork() == 0:
                _background(make_site, name, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    if not said.isdigit():
        raise BypassError(said or "the broker ended before it was ready")
    return int(said)


def _background(make_site: Callable[[str], Site], name: str, writer: int) -> None:
    waits = True  # who started us

    def ready() -> None:
        nonlocal waits
        os.write(writer, str(os.getpid()).encode())
        os.close(writer)
        waits = False

    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(
            null, stream
        )  # before bypass-fwd inherits them: who reads our output to its end shall not wait for it
    os.close(null)
    to_syslog()
    try:
        serve(make_site, name, ready)
    except BypassError as e:
        if waits:  # else it is logged
            os.write(writer, str(e).encode())


def to_syslog() -> None:
    """Where there is one."""
    logger = logging.getLogger("bypass")
    if os.path.exists("/dev/log"):
        logger.addHandler(
            logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
        )
    else:
        logger.addHandler(logging.NullHandler())


def to_stderr() -> None:
    """For the foreground; systemd's journal takes it from there."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="bypass: %(message)s")
