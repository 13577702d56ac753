# SPDX-License-Identifier: Apache-2.0
"""`bypass conns`."""

from __future__ import annotations

import json
import os
import pwd
from contextlib import suppress

import click

from bypass import netns
from bypass.broker.tools import Asking, brokers
from bypass.cli.table import print_table
from bypass.errors import BypassError
from bypass.observe import Application, Memory, Socket, look, memories, namespace_of

COLUMNS = (
    "PROTO",
    "STATE",
    "RECV-Q",
    "SEND-Q",
    "LOCAL",
    "PEER",
    "PID",
    "FD",
    "RTT ms",
    "CWND",
    "RETRANS",
    "CC",
    "ON",
)
NUMBERS = ("RECV-Q", "SEND-Q", "PID", "FD", "RTT ms", "CWND", "RETRANS")


@click.command()
@click.option("--app", metavar="NAME|PID", default="", help="Only of this application.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option(
    "--limit",
    default=1000,
    show_default=True,
    type=click.IntRange(1, 999_999_999),
    help="Rows of an application's table. Of more, those of listeners and of the kernel come first.",
)
@click.option(
    "--socket", "name", metavar="SOCKET", help="Only of the broker at this socket; @NAME is an abstract one."
)
@click.option("--all", "everywhere", is_flag=True, help="Also programs in other network namespaces.")
def conns(app: str, as_json: bool, limit: int, name: str | None, everywhere: bool) -> None:
    """Sockets of the programs that run on bypass, like ss: their state, queues and congestion control.

    ON says whose a socket is: the stack's, the kernel's and why, or of both (a listener, or a datagram socket: what
    is steered comes by the stack, the rest by the kernel). Sockets without PID are connections that the program has
    closed, or not accepted yet. Programs of other users are shown to root only, and like ss it tells of this network
    namespace, where addresses mean what they say; of others with --all, --socket, or a PID. It disturbs nobody: the
    programs' memory is read while they run.

    \b
    Examples:
      bypass conns
      bypass conns --app redis-server
      bypass conns --all
      bypass conns --json | jq '.applications[].sockets[] | select(.place == "kernel") | .why'
    """
    hidden = 0
    if name is not None:
        told = told_by(name)
    elif everywhere or app.isdecimal():
        told = applications(memories())
    else:
        every = memories()
        here = [memory for memory in every if is_here(namespace_of(memory.holders))]
        seen = applications(here)
        told = [a for a in seen if is_here(a.netns)]
        hidden = len(every) - len(here) + len(seen) - len(told)
    found = [a for a in told if not app or named(a, app)]
    if not found:
        which = f"no application {app}" if app else "no program runs on bypass"
        more = f", or in another network namespace: {hidden} there (--all)" if hidden else ""
        raise BypassError(f"{which}, or it is another user's{more} (`bypass run` starts one)")
    if as_json:
        click.echo(json.dumps({"applications": [a.model_dump() for a in found]}, indent=2))
    else:
        for one in found:
            print_application(one, limit)
        if hidden and not app:
            click.echo(f"Programs in other network namespaces: {hidden} (--all)")
    broken = [a for a in found if a.error]
    for one in broken:
        click.echo(f"bypass: the memory of {title(one)}: {one.error}", err=True)
    if broken:
        raise click.exceptions.Exit(1)


def is_here(inode: int | None) -> bool:
    """Whether this is our network namespace, as far as we know."""
    return inode in (None, namespace_of([os.getpid()]))


def applications(found_here: list[Memory]) -> list[Application]:
    """Of these memories. Who is not root asks the brokers too: in shared mode programs are not dumpable, and
    not even their own user can look into them."""
    found = [] if os.geteuid() == 0 else told_by_brokers()
    known = {pid for application in found for pid in application.holders}
    for memory in found_here:
        if known.intersection(memory.holders):
            continue
        with suppress(ProcessLookupError):  # it ended meanwhile
            found.append(look(memory))
    return found


def told_by_brokers() -> list[Application]:
    found = []
    for name in brokers():
        try:
            found += told_by(name)
        except BypassError as e:
            click.echo(f"bypass: {e}", err=True)
    return found


def told_by(name: str) -> list[Application]:
    """BypassError: this broker does not answer."""
    asking = Asking(name)
    try:
        return asking.conns()
    finally:
        asking.close()


def named(application: Application, name: str) -> bool:
    summary = application.summary
    pids = {*application.holders, *(summary.pids if summary else [])}
    return (summary is not None and summary.name == name) or (name.isdecimal() and int(name) in pids)


def title(application: Application) -> str:
    summary = application.summary
    if not summary:
        return f"the application of process {', '.join(map(str, application.holders))}"
    return summary.name or f"application {summary.app}"


def user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def print_application(application: Application, limit: int) -> None:
    summary = application.summary
    if not summary:
        return
    where = f"{summary.device} mode on {summary.interface}" if summary.interface else summary.device
    if application.netns is not None and not is_here(application.netns):
        where += f" in {netns.name_of(application.netns)}"
    processes = "process" if summary.processes == 1 else f"{summary.processes} processes:"
    pids = ", ".join(map(str, summary.pids)) + (", ..." if summary.processes > len(summary.pids) else "")
    click.echo(
        f"{title(application)}: {processes} {pids}, user {user(application.uid)}, {where}; TCP sockets: "
        f"{summary.tcp_stack:,} on the stack, {summary.tcp_kernel:,} on the kernel so far; "
        f"UDP: {summary.udp_stack:,}, {summary.udp_kernel:,}"
    )
    if summary.dead:
        click.echo("One of its processes died inside of the stack: nothing goes on there any more.")
    if application.sockets:
        shown = application.sockets
        if len(shown) > limit:
            shown = sorted(shown, key=lambda s: s.place == "stack")[:limit]
        print_table(COLUMNS, [row(s) for s in shown], right=NUMBERS)
        if len(shown) < len(application.sockets):
            click.echo(f"... and {len(application.sockets) - len(shown):,} more (--limit)")
    else:
        click.echo("No socket is open.")
    click.echo()


def row(s: Socket) -> tuple[str, ...]:
    return (
        s.proto,
        s.state or "-",
        f"{s.recv_queue}",
        f"{s.send_queue}",
        s.local or "*",
        s.peer or "*",
        "-" if s.pid is None else str(s.pid),
        "-" if s.fd is None else str(s.fd),
        "" if s.rtt_us is None else f"{s.rtt_us / 1000:.3f}",
        "" if s.cwnd is None else str(s.cwnd),
        "" if s.retransmits is None else str(s.retransmits),
        s.congestion,
        on(s),
    )


def on(s: Socket) -> str:
    """Whose it is, and why or what else there is to say."""
    place = {"both": "stack and kernel", "undecided": "not decided yet"}.get(s.place, s.place)
    more = s.error or s.why
    return f"{place}: {more}" if more else place
