# SPDX-License-Identifier: Apache-2.0
"""What docs/tcp.md names is there: files, functions, tests, scripts; and so are the links between documents."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TCP = ROOT / "docs/tcp.md"
PLACES = ("", "bypass/stack", "bypass", "bypass/include", "tests", "docs", "bench", "examples")


@lru_cache
def text(path: Path) -> str:
    return path.read_text()


def find(name: str) -> Path | None:
    return next((ROOT / p / name for p in PLACES if (ROOT / p / name).is_file()), None)


def is_missing(token: str, sources: list[Path]) -> str:
    """What of this is not there; empty: all is. `sources`: files that the same cell named before; names are theirs."""
    if m := re.fullmatch(r"(test_\w+\.py)?::(\w+)", token):
        path = ROOT / "tests" / m[1] if m[1] else sources[-1]
        sources.append(path)
        return "" if path.is_file() and re.search(rf"\b(def|class) {m[2]}\b", text(path)) else token
    if m := re.fullmatch(r"([\w/]+\.(?:c|h|py)): ([\w*]+)(?:\(\))?", token):
        path_of = find(m[1])
        if path_of is None:
            return m[1]
        sources.append(path_of)
        return "" if has(path_of, m[2]) else token
    if re.fullmatch(r"[\w/]+\.(c|h|py)", token):
        path_of = find(token)
        if path_of is not None:
            sources.append(path_of)
        return "" if path_of else token
    if re.fullmatch(r"[a-z_]+/[a-z0-9_]+", token):
        return "" if (ROOT / "tests/scripts" / f"{token}.pkt").is_file() else token
    if re.fullmatch(r"\w+(\(\))?", token):
        return "" if any(has(p, token.removesuffix("()")) for p in sources) else token
    return f"{token}: neither a file, a function, a test nor a script"


def has(path: Path, name: str) -> bool:
    return re.search(rf"\b{name.replace('*', '[a-z_]*')}\b", text(path)) is not None


def rows() -> list[tuple[int, list[str]]]:
    """Line and cells of the tables that name code and tests."""
    found = []
    columns = 0
    for number, line in enumerate(text(TCP).splitlines(), 1):
        cells = [c.strip() for c in line.strip().strip("|").split(" | ")] if line.startswith("|") else []
        if cells and cells[-1].startswith("test(s)"):
            columns = len(cells)
        elif not cells:
            columns = 0
        elif columns and not set(line) <= set("|-: "):
            found.append((number, cells))
            assert len(cells) == columns, f"docs/tcp.md:{number}: {len(cells)} cells, {columns} columns"
    return found


def test_what_the_tables_of_tcp_name_is_there() -> None:
    assert len(rows()) > 100
    wrong = []
    for number, cells in rows():
        for cell in cells[-2:]:
            sources: list[Path] = []
            for token in re.findall(r"`([^`]+)`", cell):
                if missing := is_missing(token, sources):
                    wrong.append(f"docs/tcp.md:{number}: {missing}")
    assert wrong == []


def test_every_row_names_code_and_a_proof() -> None:
    bare = [n for n, cells in rows() if not all(c.strip("- ") for c in cells[-2:])]
    assert bare == []


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_documents_link_to_what_is_there(path: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text(path)):
        if target and "://" not in target and not (path.parent / target).exists():
            wrong.append(target)
    for target in re.findall(r"`((?:docs|config|examples|bypass|tests|bench)/[\w./*]+)`", text(path)):
        if not list(ROOT.glob(target)) and not target.startswith("bench/build"):
            wrong.append(target)
    assert wrong == []
