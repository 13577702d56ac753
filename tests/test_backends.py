# SPDX-License-Identifier: Apache-2.0
"""The list of differences between backends: each is of a test that there is, and stands in the documentation."""

from __future__ import annotations

from pathlib import Path

from backends import DIFFERENCES, PARTS

TESTS = Path(__file__).parent
PAGE = " ".join((TESTS.parent / "docs" / "dpdk.md").read_text().split())


def test_each_difference_is_of_a_test_that_runs_on_both() -> None:
    for name in DIFFERENCES:
        module, test = name.split("::")
        text = (TESTS / f"{module}.py").read_text()
        assert "pytest.mark.backends" in text
        assert f"def {test}(" in text


def test_each_difference_is_documented() -> None:
    for name, why in DIFFERENCES.items():
        assert f"`{name.partition('::')[2]}`: {why}" in PAGE
    for why in PARTS.values():
        assert why in PAGE
