# SPDX-License-Identifier: Apache-2.0
"""Tables show what is in them."""

from __future__ import annotations

import pytest

from bypass.cli.table import print_table


def test_cells_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["mac", "name"], [["c6:eb:9a:ab:3e:3c", "[red]rule[/]"]])
    out = capsys.readouterr().out
    assert "c6:eb:9a:ab:3e:3c" in out
    assert "[red]rule[/]" in out


def test_marked_up_cells_keep_their_colons(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["mac"], [["[green]c6:eb:9a:ab:3e:3c[/]"]], markup=True)
    assert "c6:eb:9a:ab:3e:3c" in capsys.readouterr().out
