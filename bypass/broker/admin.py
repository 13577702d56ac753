# SPDX-License-Identifier: Apache-2.0
"""What tools ask of the broker: JSON on the same socket (a packet that begins with `{`), and what is answered.

    tool: {"do": "ps"}    broker: {"app": 1, ...}   one packet a record, then {"end": true}

Everybody may ask; who is not trusted sees its own applications only, and may neither change nor end anything. A packet
with `error` is the last one. Read by cli/broker_tools.py, which says it to people.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pwd
from collections.abc import Callable
from typing import Any

from bypass.broker.apps import App, Process
from bypass.broker.broker import Broker
from bypass.broker.looks import Looks
from bypass.errors import BypassError
from bypass.grants import ANY, WHOLE_BLOCK, Key
from bypass.policy import Policy, load_policy
from bypass.rules import PROTOCOLS
from bypass.stack_api import STREAM
from bypass.steering import BLOCK

MAX_LEASES = 100
"""Leases that one record names; `leases_total` is their number."""


class Admin:
    """Answers tools.

    Args:
        broker: whose applications they are.
        changed: called with a process that has something to read.
        stop: ends the broker.
        later: later(work, done) runs work() in a thread, and then done() in the loop.
        looks: who reads applications' memory.
    """

    def __init__(
        self,
        broker: Broker,
        changed: Callable[[Process], None],
        stop: Callable[[], None],
        later: Callable[[Callable[[], None], Callable[[], None]], None],
        looks: Looks,
    ) -> None:
        self._looks = looks
        self._broker = broker
        self._changed = changed
        self._stop = stop
        self._later = later
        self._drains: list[Process] = []
        self._told = (-1, -1)

    def request(self, process: Process, data: bytes) -> None:
        """Acts on one packet. ValueError: it is no JSON object."""
        try:
            asked = json.loads(data)
        except RecursionError as e:
            raise ValueError("nested too deep") from e
        if not isinstance(asked, dict):
            raise ValueError("not a JSON object")
        act = ACTIONS.get(str(asked.get("do")))
        try:
            if act is None:
                raise BypassError(f"the broker knows {', '.join(ACTIONS)}")
            if act in FOR_THE_TRUSTED and not process.user.trusted:
                raise BypassError("only root, and the user who runs the broker, may do that")
            act(self, process, asked)
        except BypassError as e:
            self._say(process, {"error": str(e)})

    def _say(self, process: Process, record: dict[str, Any]) -> None:
        if not process.closed:
            process.say(json.dumps(record).encode())
            self._changed(process)

    # ---- ps
    def _ps(self, process: Process, asked: dict[str, Any]) -> None:
        for app in self._broker.apps.values():
            if process.user.trusted or process.user.uid == app.user.uid:
                self._say(process, self._record(app))
        self._say(process, {"end": True})

    def _record(self, app: App) -> dict[str, Any]:
        site = self._broker.site
        return {
            "app": app.number,
            "name": app.name,
            "uid": app.user.uid,
            "user": user_name(app.user.uid),
            "pids": [p.pid for p in app.processes],
            "mode": site.mode,
            "interface": site.ifname,
            "queues": list(site.queues),
            "trouble": site.ails(),
            "memory": app.memory.size,
            "lingering": app.lingering,
            "broker": os.getpid(),
            "leases_total": len(app.leases),
            "leases": [
                {
                    "lease": lease.number,
                    "proto": "tcp" if lease.kind == STREAM else "udp",
                    "local": f"{lease.local[0]}:{lease.local[1]}"
                    + (f"-{lease.last_port}" if lease.last_port else ""),
                    "remote": f"{lease.remote[0]}:{lease.remote[1]}" if lease.remote else None,
                }
                for lease in list(app.leases.values())[:MAX_LEASES]
            ],
        }

    # ---- conns
    def _conns(self, process: Process, asked: dict[str, Any]) -> None:
        """Sockets of the applications that are the asking user's, or for the trusted all: told through a pipe, which
        comes with the answer (look.py)."""
        if set(asked) != {"do"}:
            raise BypassError("`conns` takes nothing else")
        user = process.user
        apps = [a for a in self._broker.apps.values() if user.trusted or a.user.uid == user.uid]
        record = json.dumps({"end": True, "apps": len(apps)}).encode()
        if process.closed:
            return
        process.say(record, self._looks.begin(user.uid, apps) if apps else -1)
        self._changed(process)

    # ---- down
    def _down(self, process: Process, asked: dict[str, Any]) -> None:
        drain = asked.get("drain") is True
        self._broker.drain(at_once=not drain)
        if drain:
            self._drains.append(process)
            self._told = (-1, -1)
            self.progress()
        else:
            self._say(process, {"end": True, **self._left()})
            self._stop()

    def _left(self) -> dict[str, int]:
        apps = self._broker.apps.values()
        return {"apps": len(apps), "leases": sum(len(a.leases) for a in apps)}

    def progress(self) -> None:
        """Tells who waits how much is left, when that has changed; at nothing, the broker ends."""
        self._drains = [p for p in self._drains if not p.closed]
        left = self._left()
        if not self._broker.draining or tuple(left.values()) == self._told:
            return
        self._told = (left["apps"], left["leases"])
        ended = left["leases"] == 0
        for process in self._drains:
            self._say(process, {**({"end": True} if ended else {}), **left})
        if ended:
            self._stop()

    # ---- reload
    def _reload(self, process: Process, asked: dict[str, Any]) -> None:
        site, path = self._broker.site, asked.get("policy")
        if path is not None and not isinstance(path, str):
            raise BypassError("policy is a path")
        self.reload(path or site.policy_path, lambda answer: self._say(process, answer))

    def reload(self, path: str, tell: Callable[[dict[str, Any]], None]) -> None:
        """Puts a policy in force; reads and compiles it in a thread, since a large one takes seconds.

        Raises:
            BypassError: there is none to reload.
        """
        site = self._broker.site
        if not path:
            raise BypassError("this broker has no policy")
        read: list[Policy] = []
        failed: list[BypassError] = []

        def work() -> None:
            try:
                policy = load_policy(path)
                site.prepare(policy)
                read.append(policy)
            except BypassError as e:
                failed.append(e)

        def done() -> None:
            try:
                if failed:
                    raise failed[0]
                lost = self._broker.swap(read[0])
            except BypassError as e:
                tell({"error": str(e)})
            else:
                tell({"end": True, "policy": path, "rules": len(read[0].flows), "revoked": lost})

        self._later(work, done)

    # ---- explain
    def _explain(self, process: Process, asked: dict[str, Any]) -> None:
        try:
            proto = PROTOCOLS[str(asked.get("proto"))]
            local = (ipaddress.IPv4Address(str(asked.get("local"))), _port(asked.get("local_port", 0)))
            remote = (ipaddress.IPv4Address(str(asked.get("remote"))), _port(asked.get("remote_port", 0)))
        except (KeyError, ValueError) as e:
            raise BypassError(f"that is no flow: {e}") from e
        site = self._broker.site
        answer: dict[str, Any] = {"end": True, "interface": site.ifname, "rule": None, "action": "pass"}
        rule = site.decide(proto, local, remote)
        if rule is not None:
            answer |= {
                "rule": rule.name,
                "line": rule.line,
                "action": rule.action,
                "policy": site.policy_path,
            }
        kind = STREAM if proto == PROTOCOLS["tcp"] else STREAM + 1
        owner = self._owner(kind, (str(local[0]), local[1]), (str(remote[0]), remote[1]))
        if owner is not None:
            app, key = owner
            answer |= {
                "live": _key_text(key),
                "app": app.number,
                "name": app.name,
                "user": user_name(app.user.uid),
            }
            answer["pids"] = [p.pid for p in app.processes]
        queue = site.arrival(proto, local, remote)
        answer |= {
            "queues": list(site.queues),
            "queue": queue.number,
            "queue_why": queue.why,
            "mode": site.mode,
        }
        self._say(process, answer)

    def _owner(self, kind: int, local: tuple[str, int], remote: tuple[str, int]) -> tuple[App, Key] | None:
        """In the order in which the steering program looks."""
        block = (kind, (local[0], local[1] - local[1] % BLOCK), WHOLE_BLOCK)
        for key in ((kind, local, remote), block, (kind, local, None), (kind, (ANY, local[1]), None)):
            for app in self._broker.apps.values():
                if any(lease.key == key for lease in app.leases.values()):
                    return app, key
        return None


def _port(value: object) -> int:
    if type(value) is not int or not 0 <= value <= 65535:
        raise ValueError("a port is 0 to 65535")
    return value


def _key_text(key: Key) -> str:
    kind, local, remote = key
    peer = f" from {remote[0]}:{remote[1]}" if remote else ""
    if remote == WHOLE_BLOCK:
        peer = f"-{local[1] + BLOCK - 1}"
    return f"{'tcp' if kind == STREAM else 'udp'} {'*' if local[0] == ANY else local[0]}:{local[1]}{peer}"


def user_name(uid: int) -> str:
    """As `ls -l` shows it: the number where there is no name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


Action = Callable[[Admin, Process, dict[str, Any]], None]
ACTIONS: dict[str, Action] = {
    "ps": Admin._ps,
    "conns": Admin._conns,
    "down": Admin._down,
    "reload": Admin._reload,
    "explain": Admin._explain,
}
FOR_THE_TRUSTED = (Admin._down, Admin._reload, Admin._explain)

__all__ = ["Admin", "user_name"]
