# SPDX-License-Identifier: Apache-2.0
"""The code of %{ }% blocks: assertions over TCP_INFO, and nothing else.

The statements `assert EXPRESSION` and `NAME = EXPRESSION` are known; expressions have names (tcpi_*, TCP_*, own ones),
numbers, arithmetic, comparisons, and/or/not, conditional expressions, and abs(), min(), max(). Anything else is an
error: the tree is walked, never executed as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

STATES = (
    "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK",
    "LISTEN", "CLOSING",
)  # fmt: skip
NAMES: dict[str, int] = {f"TCP_{name}": i for i, name in enumerate(STATES, 1)}
NAMES |= {f"TCP_CA_{name}": i for i, name in enumerate(("Open", "Disorder", "CWR", "Recovery", "Loss"))}
NAMES |= {"TCPI_OPT_TIMESTAMPS": 1, "TCPI_OPT_SACK": 2, "TCPI_OPT_WSCALE": 4, "TCPI_OPT_ECN": 8}
NAMES |= {"TCPI_OPT_ECN_SEEN": 16, "TCPI_OPT_SYN_DATA": 32, "True": 1, "False": 0}

BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift,
}  # fmt: skip
COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
    ast.UAdd: operator.pos,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {"abs": abs, "min": min, "max": max}


class CodeError(Exception):
    """The block says what it may not say."""


def read(code: str) -> ast.Module:
    """The block's tree. CodeError."""
    try:
        return ast.parse("\n".join(line.strip() for line in code.splitlines()), mode="exec")
    except SyntaxError as e:
        raise CodeError(f"{e.msg}: {(e.text or '').strip()!r}") from None


def run(code: str, info: Callable[[str], int], own: dict[str, Any]) -> str:
    """Runs a block. info: the value of a tcpi_ name; own: names that blocks have assigned.

    Returns:
        Why an assertion does not hold, with the values of its names; "": all hold.
    """
    for statement in read(code).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]):
                own[name] = _value(statement.value, info, own, {})
            case ast.Assert():
                seen: dict[str, Any] = {}
                if not _value(statement.test, info, own, seen):
                    values = ", ".join(f"{k} = {v}" for k, v in seen.items())
                    return f"assert {ast.unparse(statement.test)}: {values}"
            case _:
                raise CodeError(f"only assertions and assignments: {ast.unparse(statement)!r}")
    return ""


def _name(name: str, info: Callable[[str], int], own: Mapping[str, Any], seen: dict[str, Any]) -> Any:
    if name in own:
        seen[name] = own[name]
    elif name in NAMES:
        return NAMES[name]
    elif name.startswith("tcpi_"):
        seen[name] = info(name)
    else:
        raise CodeError(f"no such name: {name}")
    return seen[name]


def _value(node: ast.expr, info: Callable[[str], int], own: Mapping[str, Any], seen: dict[str, Any]) -> Any:
    def sub(n: ast.expr) -> Any:
        return _value(n, info, own, seen)

    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name):
            return _name(name, info, own, seen)
        case ast.UnaryOp(op=op) if type(op) in UNARY:
            return UNARY[type(op)](sub(node.operand))
        case ast.BinOp(op=op) if type(op) in BINARY:
            return BINARY[type(op)](sub(node.left), sub(node.right))
        case ast.BoolOp(op=ast.And()):
            return all(sub(v) for v in node.values)
        case ast.BoolOp():
            return any(sub(v) for v in node.values)
        case ast.IfExp():
            return sub(node.body) if sub(node.test) else sub(node.orelse)
        case ast.Tuple(elts=[first, *_]):  # packetdrill's `assert condition, value to show`
            return sub(first)
        case ast.Compare():
            left = sub(node.left)
            for compare, right in zip(node.ops, node.comparators, strict=True):
                if type(compare) not in COMPARE:
                    raise CodeError(f"no such comparison: {ast.unparse(node)!r}")
                value = sub(right)
                if not COMPARE[type(compare)](left, value):
                    return False
                left = value
            return True
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(sub(a) for a in node.args))
        case _:
            raise CodeError(f"not known here: {ast.unparse(node)!r}")
