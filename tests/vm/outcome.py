# SPDX-License-Identifier: Apache-2.0
"""What the guest says, line by line, and what it comes to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

COLUMNS = {
    "device": "device",
    "driver": "driver",
    "path": "who had the port",
    "http": "HTTP",
    "echo": "echo",
    "ping": "ping",
}


@dataclass
class Outcome:
    """What one run of the guest came to.

    Attributes:
        checks: (text, whether it held).
        rows: of the closing table, by the keys of COLUMNS.
        ended: the guest's test came to its end.
        unplug: a card that the guest wants to be taken away; who has done it forgets it.
        lines: everything that the guest said.
    """

    checks: list[tuple[str, bool]] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    ended: bool = False
    unplug: str = ""
    lines: list[str] = field(default_factory=list)

    def hear(self, line: str) -> str:
        """Takes a line in; what a person should see of it, or ""."""
        self.lines.append(line)
        if not line.startswith("@ "):
            return line
        try:
            said: dict[str, Any] = json.loads(line[2:])
        except ValueError:
            return line  # the kernel, or a crash, wrote into it: what is missing then is a failure
        if "check" in said:
            self.checks.append((said["check"], bool(said["ok"])))
            return f"{'ok    ' if said['ok'] else 'FAILED'} {said['check']}"
        if "row" in said:
            self.rows.append(said["row"])
        elif "unplug" in said:
            self.unplug = said["unplug"]
        elif "part" in said:
            return f"       -- {said['part']}: {said['seconds']} s"
        elif "end" in said:
            self.ended = True
            known = {text for text, ok in self.checks if not ok}
            if said["failed"] and not known:
                self.checks.append((f"parts failed: {', '.join(said['failed'])}", False))
        return ""

    @property
    def failed(self) -> list[str]:
        """What did not hold. A run without any check has failed, too."""
        return [text for text, ok in self.checks if not ok] or (
            [] if self.checks else ["nothing was checked"]
        )

    def table(self) -> Table:
        table = Table(box=box.SIMPLE, min_width=100)
        for title in COLUMNS.values():
            table.add_column(title, overflow="fold")
        for row in self.rows:
            table.add_row(*(row.get(key, "") for key in COLUMNS))
        return table
