# SPDX-License-Identifier: Apache-2.0
"""YAML of a policy as plain data, and where each part of it stands.

What lives here: one pass over PyYAML's parse events that builds dictionaries, lists and scalars within bounds, and
the same pass again to find the line and column of chosen paths, which only a file with errors needs. What does
not: what the data means (`policy.py`).

Events are used instead of PyYAML's node trees because those lose duplicate keys' places, follow nesting by
recursion, and take a gigabyte for a million rules. Scalars follow YAML 1.1 as PyYAML does, with one difference: a
number that is not written in plain decimal digits (octal, base 60, hexadecimal) becomes an `Oddity`, which no
field accepts, instead of a number that its author did not mean.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from bypass.errors import Problem

MAX_DEPTH = 32
"""Nesting of lists and mappings. A policy needs four."""
MAX_NODES = 32_000_000
"""Values, keys, lists and mappings, with aliases counted as often as they are used."""
MAX_TEXT = 60
"""Characters of a value that an error shows."""

Path = tuple[str | int, ...]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast
_DECIMAL = re.compile(r"0|-?[1-9][0-9]*")
_BREAKS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_resolver: Any = yaml.SafeLoader("")  # for its rules of implicit types only


@dataclass(frozen=True, slots=True)
class Oddity:
    """A plain scalar that YAML 1.1 reads as something its author hardly means."""

    raw: str
    meaning: str  # completes "RAW is ...": "the number 1342 in YAML (base 60)"


@dataclass(slots=True)
class Place:
    """Where a value stands, and its key when it has one. Lines and columns from 1."""

    line: int
    column: int
    raw: str | None  # as written; None: a list or a mapping
    key_line: int = 0
    key_column: int = 0


@dataclass(slots=True)
class Document:
    """What one pass found.

    Attributes:
        data: dictionaries with text keys, lists, and scalars; None for an empty document.
        item_marks: line and column of each item of the top-level list `items_key`.
        duplicates: keys that their mapping holds already; in `data` the first one's value counts.
        problems: what makes the document unusable; `data` is then incomplete.
        places: for the paths that were asked for.
    """

    data: Any = None
    item_marks: list[tuple[int, int]] = field(default_factory=list)
    duplicates: list[Problem] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    places: dict[Path, Place] = field(default_factory=dict)


class _Refused(Exception):
    """Reading ends here."""

    def __init__(self, mark: Any, message: str, hint: str = "") -> None:
        super().__init__(message)
        line, column = (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)
        self.problem = Problem("", line, column, message, "", hint)


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end was not yet met."""

    value: Any
    at: str | int  # its key or index in what holds it
    anchor: str | None
    nodes_before: int
    key: str | int | None  # of the value that comes next; None in a mapping: a key comes next
    duplicate: bool = False  # the value that comes next belongs to a repeated key
    lines: dict[str, int] = field(default_factory=dict)  # of the keys of a mapping


def read_yaml(text: str, items_key: str, wanted: Collection[Path] = ()) -> Document:
    """Reads one YAML document.

    Args:
        text: the document.
        items_key: the top-level key whose list items are marked.
        wanted: paths whose places are wanted; a key that is missing has no place.

    Returns:
        The document; never raises for what the text holds.
    """
    doc = Document()
    reader = _Reader(doc, items_key, frozenset(wanted))
    with no_garbage_collection():
        try:
            for event in yaml.parse(text, Loader=_LOADER):
                reader.event(event)
        except _Refused as refused:
            doc.problems.append(refused.problem)
        except yaml.MarkedYAMLError as error:
            doc.problems.append(_syntax_problem(error))
        except (yaml.reader.ReaderError, UnicodeEncodeError) as error:
            doc.problems.append(_character_problem(text, error))
    return doc


class _Reader:
    """Builds values from events, with an explicit stack."""

    def __init__(self, doc: Document, items_key: str, wanted: frozenset[Path]) -> None:
        self.doc = doc
        self.items_key = items_key
        self.wanted = wanted
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.nodes = 0
        self.documents = 0
        self.plain: dict[str, Any] = {}
        self.key_mark: Any = None

    def event(self, event: Any) -> None:
        kind = type(event)
        if kind is yaml.ScalarEvent:
            self._scalar(event)
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            self._start(event, {} if kind is yaml.MappingStartEvent else [])
        elif kind is yaml.MappingEndEvent or kind is yaml.SequenceEndEvent:
            self._end()
        elif kind is yaml.AliasEvent:
            self._alias(event)
        elif kind is yaml.DocumentStartEvent:
            self.documents += 1
            if self.documents > 1:
                raise _Refused(event.start_mark, "a second document", "a policy is one YAML document")

    def _scalar(self, event: Any) -> None:
        value = event.value
        if event.tag is not None:
            raise _Refused(
                event.start_mark, f"the tag {_short_tag(event.tag)}", "write the value without a tag"
            )
        if self.stack and self.stack[-1].key is None:
            self._key(event, value)
            return
        raw = value
        if event.implicit[0]:  # plain, not quoted
            try:
                value = self.plain[raw]
            except KeyError:
                value = self.plain[raw] = plain_scalar(raw)
        self._add(event, value, raw)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, 1)

    def _start(self, event: Any, value: Any) -> None:
        if event.tag is not None:
            raise _Refused(
                event.start_mark, f"the tag {_short_tag(event.tag)}", "write the value without a tag"
            )
        if len(self.stack) >= MAX_DEPTH:
            raise _Refused(event.start_mark, f"nested deeper than {MAX_DEPTH} levels", "a policy needs four")
        if self.stack and self.stack[-1].key is None:
            raise _Refused(event.start_mark, "a list or mapping as a key", "keys are plain text")
        at = self.stack[-1].key if self.stack else ""
        before = self.nodes
        self._add(event, value, None)
        assert at is not None  # a key in a mapping was met above
        self.stack.append(_Open(value, at, event.anchor, before, 0 if type(value) is list else None))

    def _end(self) -> None:
        done = self.stack.pop()
        if done.anchor is not None:
            self.anchors[done.anchor] = (done.value, self.nodes - done.nodes_before)

    def _alias(self, event: Any) -> None:
        if event.anchor not in self.anchors:
            raise _Refused(event.start_mark, f"*{event.anchor} names no anchor that is complete before it")
        value, size = self.anchors[event.anchor]
        if self.stack and self.stack[-1].key is None:
            raise _Refused(event.start_mark, f"the alias *{event.anchor} as a key", "keys are plain text")
        self.nodes += size - 1
        self._add(event, value, None if isinstance(value, dict | list) else scalar_text(value))

    def _key(self, event: Any, name: str) -> None:
        top = self.stack[-1]
        self._count(event)
        top.key = name
        mark = self.key_mark = event.start_mark
        top.duplicate = name in top.lines
        if top.duplicate:
            message = f"the key is here a second time, first in line {top.lines[name]}"
            where = path_text(self._path())
            self.doc.duplicates.append(Problem(where, mark.line + 1, mark.column + 1, message, shown(name)))
        else:
            top.lines[name] = mark.line + 1
        if event.anchor is not None:
            self.anchors[event.anchor] = (name, 1)

    def _add(self, event: Any, value: Any, raw: str | None) -> None:
        """Puts a value where the innermost open list or mapping expects one."""
        self._count(event)
        if self.wanted:
            self._note_place(event, raw)
        if not self.stack:
            self.doc.data = value
            return
        top = self.stack[-1]
        if type(top.value) is list:
            if len(self.stack) == 2 and top.at == self.items_key:
                self.doc.item_marks.append((event.start_mark.line + 1, event.start_mark.column + 1))
            top.value.append(value)
            top.key += 1  # type: ignore[operator]
        else:
            if not top.duplicate:
                top.value[top.key] = value
            top.key = None

    def _path(self) -> Path:
        """Of the value that comes next."""
        if not self.stack:
            return ()
        key = self.stack[-1].key
        return (*(inner.at for inner in self.stack[1:]), "" if key is None else key)

    def _note_place(self, event: Any, raw: str | None) -> None:
        path = self._path()
        if path in self.wanted and path not in self.doc.places:
            mark = event.start_mark
            place = Place(mark.line + 1, mark.column + 1, raw)
            if path and isinstance(path[-1], str):
                place.key_line, place.key_column = self.key_mark.line + 1, self.key_mark.column + 1
            self.doc.places[path] = place

    def _count(self, event: Any) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            hint = "aliases count as often as they are used"
            raise _Refused(event.start_mark, f"more than {MAX_NODES} values", hint)


def plain_scalar(raw: str) -> Any:
    """The value of an unquoted scalar: None, bool, int, float, text, or an Oddity."""
    tag = _resolver.resolve(yaml.ScalarNode, raw, (True, False)).rpartition(":")[2]
    if tag in ("int", "float") and len(raw) > MAX_TEXT:
        return Oddity(raw, f"a number of {len(raw)} characters")
    if tag == "int":
        return int(raw) if _DECIMAL.fullmatch(raw) else Oddity(raw, _odd_number(raw))
    if tag == "float":
        return Oddity(raw, "a number in base 60 in YAML") if ":" in raw else _float(raw)
    if tag == "bool":
        # Only true and false are booleans in every YAML; the rest is a trap of version 1.1.
        return raw.lower() == "true" if raw.lower() in ("true", "false") else Oddity(raw, "a boolean in YAML")
    if tag == "null":
        return None
    if tag == "timestamp":
        return Oddity(raw, "a date in YAML")
    return raw


def _float(raw: str) -> float:
    text = raw.replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _odd_number(raw: str) -> str:
    value = _resolver.construct_yaml_int(yaml.ScalarNode("tag:yaml.org,2002:int", raw))
    digits = raw.lstrip("+-")
    if ":" in raw:
        kind = "base 60"
    elif digits[:2] in ("0x", "0b"):
        kind = {"0x": "hexadecimal", "0b": "binary"}[digits[:2]]
    elif len(digits) > 1 and digits.startswith("0"):
        kind = "octal"
    else:
        kind = "with signs or underscores left out"
    return f"the number {value} in YAML ({kind})"


def _short_tag(tag: str) -> str:
    return shown(tag.replace("tag:yaml.org,2002:", "!!", 1))


def scalar_text(value: Any) -> str:
    """A scalar as it may have been written."""
    if isinstance(value, Oddity):
        return value.raw
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def path_text(path: Path) -> str:
    """`flows[0].match.local_port`"""
    parts = [f"[{p}]" if isinstance(p, int) else f".{shown(p)}" for p in path]
    return "".join(parts).removeprefix(".")


def shown(raw: str) -> str:
    """A value fit for an error message: one line, printable, at most MAX_TEXT characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in raw[: MAX_TEXT + 1])
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def _syntax_problem(error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    message = "not YAML: " + (error.problem or "cannot be read")
    if error.context:
        message += f" ({error.context})"
    line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
    hint = ""
    if "start any token" in message:
        hint = "indent by spaces, not tabs, and put special characters in quotes"
    elif "':'" in message or "mapping values" in message:
        hint = "put a value that holds `:` in quotes, and a space behind the `:` of a key"
    return Problem("", line, column, message, "", hint)


def _character_problem(text: str, error: yaml.reader.ReaderError | UnicodeEncodeError) -> Problem:
    """A character that YAML forbids. libyaml tells no place, so it is looked for."""
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad is None:
        return Problem("", 0, 0, f"not YAML: {error.reason}")
    lines = _BREAKS.split(text[: bad.start()])
    message = f"not YAML: the character U+{ord(bad.group()):04X}"
    return Problem("", len(lines), len(lines[-1]) + 1, message, "", "YAML allows printable characters only")


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A million rules are a hundred million objects without cycles: scanning them takes most of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
