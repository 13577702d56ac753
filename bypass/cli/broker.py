# SPDX-License-Identifier: Apache-2.0
"""`bypass up | down | reload`."""

from __future__ import annotations

import os
from contextlib import suppress

import click

from bypass.broker.protocol import socket_name
from bypass.broker.tools import Asking, ask
from bypass.errors import BypassError, PrivilegeError

SOCKET = click.option(
    "--socket",
    "name",
    metavar="SOCKET",
    help="The broker's socket; @NAME is an abstract one. Default: BYPASS_SOCKET, else /run/bypass/broker.sock.",
)


DRAIN_LOOK_S = 0.5
LIVE = ("ESTAB", "SYN-SENT", "SYN-RECV", "FIN-WAIT-1", "FIN-WAIT-2", "CLOSE-WAIT", "CLOSING", "LAST-ACK")
"""States of connections that an end of the broker costs somebody."""


@click.command()
@click.option(
    "-c", "--policy", metavar="POLICY", help="Default: BYPASS_POLICY, else /etc/bypass/policy.yaml."
)
@click.option("--foreground", is_flag=True, help="Stay, and say what happens on stderr; for systemd.")
@SOCKET
def up(policy: str | None, foreground: bool, name: str | None) -> None:
    """Start a broker, which lets programs (`bypass run`) take the flows that POLICY grants them.

    It works in the network namespace in which it is started. It ends by `bypass down` or SIGTERM; SIGHUP reads POLICY
    again. Under systemd it takes a passed socket and tells when it is ready.

    \b
    Examples:
      bypass up -c /etc/bypass/policy.yaml
      bypass up -c policy.yaml --foreground --socket @test
    """
    from bypass.broker import daemon
    from bypass.broker.shared import site_of
    from bypass.broker.site import Site
    from bypass.cli.run import DEFAULT_POLICY
    from bypass.policy import load_policy

    loaded = load_policy(os.path.abspath(policy or os.environ.get("BYPASS_POLICY") or DEFAULT_POLICY))
    if os.geteuid() != 0:
        raise PrivilegeError("a broker needs root (CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, CAP_IPC_LOCK)")
    name = name or socket_name()

    def make(socket: str) -> Site:
        return site_of(loaded, socket)

    if foreground:
        daemon.to_stderr()
        daemon.serve(make, name, lambda: None)
    else:
        pid = daemon.in_background(make, name)
        click.echo(f"broker {pid} serves {loaded.interface} by {loaded.path} at {name}")


@click.command()
@click.option(
    "--drain",
    is_flag=True,
    help="Wait until programs have no connection on the stack any more; nothing new is granted.",
)
@SOCKET
def down(drain: bool, name: str | None) -> None:
    """End a broker. The kernel has all flows of its interface again.

    At once: connections on the stack die, and it is told how many, and leases. With --drain nothing new is
    granted: ports that programs open from then on are the kernel's. It waits for TCP connections, and says how many
    there are. A server that listens already takes new ones until then, and goes on by the kernel afterwards.
    Interrupted, the broker goes on draining, and ends when programs have given back all of their ports.

    \b
    Examples:
      bypass down --drain
      bypass down --socket @test
    """
    name = name or socket_name()
    had = _connections(name)
    asking = Asking(name)
    try:
        record: dict[str, int] = {}
        if not drain or not _drained(asking, name):
            record = list(asking.ask({"do": "down"}))[-1]
        asking.wait_for_end()
    finally:
        asking.close()
    if not drain and record.get("leases"):
        click.echo(f"the broker has ended; {_leases(record)} died{_with(', with {}', had)}")
        return
    ended = f"; {_count(had, 'connection')} came to an end before" if had else ""
    kernels = f"; {_leases(record)} went to the kernel" if record.get("leases") else ""
    click.echo(f"the broker has ended{ended}{kernels}" + ("" if ended or kernels else "; nothing was in use"))


def _drained(asking: Asking, name: str) -> bool:
    """Waits until no program has a connection. Whether the broker has ended by itself: no program has a port either."""
    said = 0
    for record in asking.ask({"do": "down", "drain": True}, DRAIN_LOOK_S, idle=True):
        if record.get("end"):
            return True
        live = _connections(name)
        if not live:
            break
        if live != said:
            click.echo(f"waiting: {_count(live, 'connection')} on the stack")
        said = live
    return False


def _connections(name: str) -> int:
    """TCP connections that its applications have on the stack now, read from their memory as `bypass conns` does it."""
    from bypass.observe import look, memories

    brokers: set[int] = set()
    with suppress(BypassError):  # it has just ended, or there is none
        brokers = {record["broker"] for record in ask(name, {"do": "ps"}) if "broker" in record}
    count = 0
    for memory in memories() if brokers else []:
        if not brokers.isdisjoint(memory.holders):
            with suppress(ProcessLookupError):  # it has ended meanwhile
                count += sum(s.proto == "tcp" and s.state in LIVE for s in look(memory).sockets)
    return count


def _leases(record: dict[str, int]) -> str:
    return f"{_count(record['leases'], 'lease')} of {_count(record['apps'], 'application')}"


def _with(text: str, connections: int) -> str:
    return text.format(_count(connections, "connection")) if connections else ""


def _count(n: int, singular: str) -> str:
    return f"{n} {singular}{'s' * (n != 1)}"


@click.command()
@click.option(
    "-c", "--policy", metavar="POLICY", help="Another file. Default: the one that is in force, read again."
)
@SOCKET
def reload(policy: str | None, name: str | None) -> None:
    """Put a changed policy in force. Traffic goes on: each packet meets the old rules or the new ones.

    What is granted no more is the kernel's at once, and its program is told. A policy with an error changes nothing.
    Interface, mode and backend cannot change under a running broker.

    \b
    Examples:
      bypass reload
      bypass reload -c /etc/bypass/tonight.yaml
    """
    question = {"do": "reload"} | ({"policy": os.path.abspath(policy)} if policy is not None else {})
    asking = Asking(name or socket_name())
    try:
        (answer,) = asking.ask(question, 300.0)
    except ValueError as e:
        raise BypassError("the broker gives no answer") from e
    finally:
        asking.close()
    revoked = f"; {answer['revoked']} leases are granted no more" if answer["revoked"] else ""
    click.echo(f"{answer['policy']}: {answer['rules']} rules in force{revoked}")
