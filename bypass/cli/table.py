# SPDX-License-Identifier: Apache-2.0
"""Tables for people, the same for every command: as wide as the terminal, or as wide as needed when piped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def console() -> Console:
    """Standard output. Not a terminal and no COLUMNS: wide enough that nothing is cut."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(file=sys.stdout, width=200 if piped else None, highlight=False)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]], *, right: Iterable[str] = ()) -> None:
    """A table on standard output. `right`: the columns that hold numbers. Cells may hold rich's markup."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    numbers = set(right)
    for name in columns:
        table.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)
