# SPDX-License-Identifier: Apache-2.0
"""Blocks of local ports, from which an application connects without asking for each connection.

What lives here: which block may be handed out, and that the kernel takes none of its ports meanwhile. A block has
BLOCK ports, the first a multiple of BLOCK, of one protocol and local address; one entry of steering takes their
packets, as far as the rules allow (bypass.steering). What does not live here: what is live (site.py), messages
(leasing.py).

The kernel chooses no port that net.ipv4.ip_local_reserved_ports names. The ports of a block are added to what is there
and taken off again, and so that this outlives nobody, a file says what was added by whom: the next broker of the
network namespace takes off what a dead one has left. A program may still bind to such a port by name; who connects
skips it.

Source: ip-sysctl.rst (ip_local_reserved_ports), socket(7) SO_NETNS_COOKIE.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from bypass import netns
from bypass.broker.apps import App, Lease
from bypass.broker.site import Site
from bypass.core import Address
from bypass.errors import BypassError
from bypass.grants import ANY, WHOLE_BLOCK, Grants, Key
from bypass.records import PORTS, forget, is_alive, started, write
from bypass.stack_api import STREAM
from bypass.steering import BLOCK

log = logging.getLogger("bypass.broker")

MAX_BLOCKS = 32
"""Of one application: 8192 ports."""
TRIES = 8
RECORDS = PORTS
RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")

# ---- The kernel's list --------------------------------------------------------------------------------------------


def _parse(text: str) -> set[int]:
    """Ports of a list like `1-5,8`."""
    ports: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            ports.update(range(int(first), int(last or first) + 1))
    return ports


def _format(ports: Iterable[int]) -> str:
    """The list, as the kernel writes it; empty: a newline, which empties it."""
    spans: list[list[int]] = []
    for port in sorted(ports):
        if spans and spans[-1][1] == port - 1:
            spans[-1][1] = port
        else:
            spans.append([port, port])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) + "\n"


class Reserved:
    """Blocks that the kernel takes no ports of, in the network namespace of the calling thread. Raises OSError.

    Args:
        records: the folder of the notes.
        keeper: the process with whose end they are free at the latest; None: this one.
        left: blocks that a killed broker had from the same keeper, to go on with.
    """

    def __init__(
        self, records: Path | None = None, keeper: int | None = None, left: Iterable[int] = ()
    ) -> None:
        self._folder = RECORDS if records is None else records
        self._mine: set[int] = set(left)  # first ports
        self._netns = netns.cookie()
        self._pid = os.getpid() if keeper is None else keeper
        whose = f"{self._pid}-{id(self):x}" if keeper is None else f"{keeper}"
        self._file = self._folder / f"{self._netns}-{whose}"
        self._clean()

    def ports(self) -> set[int]:
        """All that are reserved, by whomever."""
        return _parse(RESERVED.read_text())

    def add(self, first: int) -> None:
        """Reserves a block, of which nothing is reserved yet."""
        self._mine.add(first)
        self._note()
        RESERVED.write_text(_format(self.ports() | _ports(first)))

    def remove(self, first: int) -> None:
        self._mine.discard(first)
        RESERVED.write_text(_format(self.ports() - _ports(first)))
        self._note()

    def _note(self) -> None:
        """Before anything is added, and after it is taken off."""
        if not self._mine:
            self._file.unlink(missing_ok=True)
            return
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        about = {"keeper": [self._pid, started(self._pid) or 0], "blocks": sorted(self._mine)}
        write(self._file, json.dumps(about))

    def _clean(self) -> None:
        """Takes off what brokers have left that were killed."""
        forget(self._folder)
        left: set[int] = set()
        dead = []
        for path in self._folder.glob(f"{self._netns}-*"):
            try:
                about = json.loads(path.read_text())
                pid, when = about["keeper"]
                alive = is_alive((pid, when))
                blocks = set(map(int, about["blocks"]))
            except (ValueError, KeyError, TypeError) as e:
                log.warning("%s is damaged (%s): it is not heeded; see %s", path, e, RESERVED)
                continue
            if path == self._file:
                left |= blocks - self._mine  # of the broker before us
            elif not alive:
                dead.append(path)
                left |= blocks - self._mine
        if left or self._mine:
            self._note()
            ports = self.ports().difference(*map(_ports, left)).union(*map(_ports, self._mine))
            RESERVED.write_text(_format(ports))
        for path in dead:
            path.unlink(missing_ok=True)


def _ports(first: int) -> set[int]:
    return set(range(first, first + BLOCK))


# ---- Handing out ----------------------------------------------------------------------------------------------------


class Blocks:
    """Blocks of one broker."""

    def __init__(
        self, records: Path | None = None, *, keeper: int | None = None, left: Iterable[Lease] = ()
    ) -> None:
        self._users = Counter(
            lease.local[1] for lease in left
        )  # of a block's first port: protocols and addresses
        self._reserved = Reserved(records, keeper, self._users)

    def lease(
        self, app: App, kind: int, host: str, remote: Address, site: Site, *, another: bool
    ) -> Lease | None:
        """A block from which an application may reach a peer: the last that it had, unless it wants another one. None:
        it cannot have any.

        Raises:
            OSError: the peer is not reached at all.
        """
        host = host if host != ANY else site.source_for(remote[0])
        grants = site.grants(app.user)
        mine = [lease for lease in app.leases.values() if lease.last_port]
        if not another:
            for lease in reversed(mine):
                if lease.kind == kind and lease.local[0] == host and still_granted(grants, lease):
                    return lease
        if len(mine) >= MAX_BLOCKS:
            return None
        new: Lease | None = None
        try:
            first = self.take(kind, host, grants, remote)
            if first is None:
                return None
            key: Key = (kind, (host, first), WHOLE_BLOCK)
            app.last_lease += 1
            new = Lease(app.last_lease, kind, (host, first), None, key, None, first + BLOCK - 1)
            site.leased(app, new)
            site.use(key, app.number)
        except (BypassError, OSError) as e:
            log.warning("no block of ports for %s: %s", app.who(), e)
            if new is not None:
                site.released(app, new)
                self.give(new.local[1])
            return None
        app.leases[new.number] = new
        return new

    def take(self, kind: int, host: str, grants: Grants, remote: Address) -> int | None:
        """A block's first port, reserved; None: there is none for this user and peer. OSError."""
        tried = 0
        for first, by_name in self._candidates():
            if tried == TRIES:
                break
            rule = grants.find(kind, (host, first), remote)
            if rule is None or (by_name and rule.local_port is None):
                continue
            if not _granted(kind, host, first, grants, remote):
                continue
            tried += 1
            self._reserved.add(first)
            if _free(kind, first):
                self._users[first] = 1
                return first
            self._reserved.remove(first)
        return None

    def give(self, first: int) -> None:
        """It is the kernel's again."""
        self._users[first] -= 1
        if self._users[first] == 0:
            del self._users[first]
            with suppress(OSError):  # the namespace's own /proc is gone, and the list with it
                self._reserved.remove(first)

    def _candidates(self) -> Iterator[tuple[int, bool]]:
        """In any order those of which the kernel would take a port; then the others, which a rule has to name: they are
        likely to be somebody's."""
        reserved = self._reserved.ports()
        low, high = map(int, EPHEMERAL.read_text().split())
        every = [f for f in range(4 * BLOCK, 1 << 16, BLOCK) if reserved.isdisjoint(range(f, f + BLOCK))]
        random.shuffle(every)
        inside = [f for f in every if low <= f and f + BLOCK - 1 <= high]
        yield from ((first, False) for first in inside)
        yield from ((first, True) for first in every if first not in inside)


def still_granted(grants: Grants, lease: Lease) -> bool:
    """What somebody has is granted as the policy is now; of a block, every port."""
    remote = None if lease.key[2] == WHOLE_BLOCK else lease.key[2]
    host, first = lease.key[1]
    ports = range(first, max(first, lease.last_port) + 1)
    return all(grants.find(lease.kind, (host, port), remote) is not None for port in ports)


def _granted(kind: int, host: str, first: int, grants: Grants, remote: Address) -> bool:
    """Every port: to this peer, and no packet comes by a rule that the user may not use."""
    return all(
        grants.find(kind, (host, port), remote) is not None
        and grants.find(kind, (host, port), None) is not None
        for port in range(first, first + BLOCK)
    )


def _free(kind: int, first: int) -> bool:
    """No socket has any of the ports, whatever its address, its family, and its state: TIME_WAIT counts."""
    what = socket.SOCK_STREAM if kind == STREAM else socket.SOCK_DGRAM
    for port in range(first, first + BLOCK):
        with socket.socket(socket.AF_INET, what) as probe:
            try:
                probe.bind(("", port))
            except OSError as e:
                if e.errno in (errno.EADDRINUSE, errno.EACCES):
                    return False
                raise
    return True
