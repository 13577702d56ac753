# SPDX-License-Identifier: Apache-2.0
"""What an error of a policy says, and where.

What lives here: pydantic's errors in our words, and the line, column and text that belong to each. What does not: what
each field may hold and its words (`policy_fields.py`), places in YAML (`policy_yaml.py`).
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from bypass.errors import Problem
from bypass.policy_fields import (
    BACKENDS,
    TEXTS,
    AfxdpModel,
    AllowModel,
    DpdkModel,
    EalModel,
    FlowModel,
    HeadModel,
    MatchModel,
    QuotaModel,
    RouteModel,
    StackModel,
    Wrong,
    backend_kind,
)
from bypass.policy_values import MAX_RULES
from bypass.policy_yaml import Oddity, Path, Place, path_text, scalar_text, shown

_MODELS: dict[str, type[BaseModel]] = {
    "": HeadModel,
    "backend": AfxdpModel,
    "dpdk": DpdkModel,
    "eal": EalModel,
    "route": RouteModel,
    "stack": StackModel,
    "flow": FlowModel,
    "match": MatchModel,
    "allow": AllowModel,
    "quota": QuotaModel,
}
_TEXT_FIELDS = {
    "interface",
    "profile",
    "congestion",
    "kind",
    "mode",
    "name",
    "action",
    "proto",
    "local",
    "remote",
    "device",
    "to",
    "via",
}


def _where(path: Path, kind: str) -> tuple[str, str]:
    """The mapping (a key of _MODELS) and field that a path leads to. `kind`: of the backend."""
    if len(path) > 1 and path[-2] == "quota":
        return "quota", str(path[-1])
    if path[:1] == ("flows",) and len(path) > 1:
        if path[2:3] == ("allow",) and len(path) > 3:
            return "allow", str(path[3])
        if path[2:3] == ("match",) and len(path) > 3:
            return "match", str(path[3])
        return "flow", str(path[2]) if len(path) > 2 else ""
    if path[:2] == ("backend", "eal") and len(path) > 2:
        return "eal", str(path[2])
    if path[:1] == ("backend",) and len(path) > 1:
        return "dpdk" if kind == "dpdk" else "backend", str(path[1])
    if path[:1] == ("stack",) and len(path) > 1:
        return "stack", str(path[1])
    if path[:1] == ("routes",) and len(path) > 1:
        return "route", str(path[2]) if len(path) > 2 else ""
    return "", str(path[0]) if path else ""


def field_errors(error: ValidationError, at: Path) -> list[Wrong]:
    """pydantic's errors in our words. `at`: where the model that found them stands."""
    wrongs = []
    for detail in error.errors(include_url=False, include_input=False):
        path, kind = (*at, *detail["loc"]), ""
        if path[:1] == ("backend",) and len(path) > 1:  # pydantic names the model of the union too
            kind, path = str(path[1]), (path[0], *path[2:])
        mapping, name = _where(path, kind)
        text = TEXTS.get((mapping, name))
        if detail["type"] == "extra_forbidden" and (other := _other_backend(path, kind)):
            wrongs.append(
                Wrong(
                    path,
                    f"is for kind: {other}",
                    _INSTEAD.get((kind, name), f"leave it out with {kind}"),
                    whole=True,
                    at_key=True,
                )
            )
        elif detail["type"] == "extra_forbidden":
            known = list(_MODELS[mapping].model_fields)
            near = difflib.get_close_matches(name[:40], known, 1)
            right = f"did you mean {near[0]}?" if near else "the keys here are " + ", ".join(known)
            wrongs.append(Wrong(path, "unknown key", right, whole=True, at_key=True))
        elif text is None:
            raise AssertionError(f"no text for the field {mapping}.{name}") from error
        elif detail["type"] == "missing":
            wrongs.append(Wrong(path[:-1], f"{name} is missing", text.right, whole=True))
        elif detail["type"] in ("too_short", "too_long"):
            wrong = "is empty" if detail["type"] == "too_short" else f"has more than {MAX_RULES} items"
            wrongs.append(Wrong(path, f"the list {wrong}", text.right, whole=True))
        else:
            context = detail.get("ctx", {}) if detail["type"] == "policy" else {}
            item = context.get("at")
            where = path if item is None else (*path, item)
            wrongs.append(
                Wrong(where, context.get("wrong") or text.wrong, context.get("right") or text.right)
            )
    return wrongs


_INSTEAD = {  # what a backend has in place of another's key
    ("dpdk", "mode"): "a DPDK port has one owner, and offloads says what it does",
    ("afxdp", "device"): "`interface` names the kernel's device",
    ("afxdp", "mtu"): "the kernel's device has it: `ip link set mtu`",
    ("afxdp", "vlan"): "the kernel's VLAN device has it",
    ("afxdp", "idle_us"): "AF_XDP wakes who sleeps; stack.spin_us says how long a call polls",
}


def _other_backend(path: Path, kind: str) -> str:
    """The backend that has such a key, when this one has not."""
    return next((k for k, m in BACKENDS.items() if kind and len(path) == 2 and path[1] in m.model_fields), "")


def located_problem(wrong: Wrong, places: dict[Path, Place], data: Any) -> Problem:
    """An error with its place and the text that stands there. `data`: the whole document."""
    path = wrong.path
    known = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in places or n == 0)
    place = places.get(known, Place(1, 1, None))
    line, column = (
        (place.key_line, place.key_column) if wrong.at_key and known == path else (place.line, place.column)
    )
    value = None if wrong.whole else _value_at(data, path)
    raw = place.raw
    if known != path and not isinstance(value, list | dict):
        raw = scalar_text(value)  # it came by an alias: the place is that of the alias
    raw = shown(raw) if raw is not None else ""
    if wrong.whole:
        return Problem(path_text(path), line, column, wrong.wrong, raw, wrong.right)
    message, right = f"{_described(value, raw)} {wrong.wrong}", wrong.right
    odd = _odd_meaning(value)
    if odd:
        message = f"{raw} is {odd}"
    if (
        (odd or type(value) is int)
        and path[-1] in _TEXT_FIELDS
        and wrong.right == TEXTS[_where(path, _kind_of(data))].right
    ):
        right = f"put it in quotes if it is meant as text; {right}"
    return Problem(path_text(path), line, column, message, raw, right)


def _kind_of(data: Any) -> str:
    return backend_kind(data.get("backend")) if isinstance(data, dict) else ""


def _value_at(data: Any, path: Path) -> Any:
    for step in path:
        data = data[step]
    return data


def _described(value: Any, raw: str) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return raw or ("an empty value" if value is None else "an empty text")


def _odd_meaning(value: Any) -> str:
    """What YAML takes a value for, where its author may not know it."""
    if isinstance(value, Oddity):
        return value.meaning
    return "a boolean in YAML" if isinstance(value, bool) else ""
