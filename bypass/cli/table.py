# SPDX-License-Identifier: Apache-2.0
"""Tables for people, the same for every command: as wide as the terminal, or as wide as needed when piped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Standard output. Not a terminal and no COLUMNS: wide enough that nothing is cut."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(file=sys.stdout, width=200 if piped else None, highlight=False, emoji=False)


def print_table(
    columns: Iterable[str], rows: Iterable[Iterable[str]], *, right: Iterable[str] = (), markup: bool = False
) -> None:
    """A table on standard output. `right`: the columns that hold numbers. `markup`: cells hold rich's markup; else
    they are printed as they are (a MAC address may look like an emoji's code, a name like a tag)."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    numbers = set(right)
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell if markup else Text(cell) for cell in row))
    console().print(table)
