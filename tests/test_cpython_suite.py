# SPDX-License-Identifier: Apache-2.0
"""The runner of CPython's tests tells what happened, also where a test hangs or ends the process; and a short run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cpython_suite as suite
import pytest
from conftest import missing
from preloaded import SURFACES

MODULE = """
import os, time, unittest

class A(unittest.TestCase):
    def test_1_good(self): pass
    def test_2_bad(self): self.assertEqual(1, 2)
    def test_3_hangs(self): time.sleep(60)
    def test_4_raises(self): raise OSError("no")
    def test_5_ends_the_process(self): os._exit(7)
    @unittest.skip("not today")
    def test_6_skipped(self): pass
    def test_7_part(self):
        with self.subTest("one"): self.fail("one of them")
    def test_8_good(self): pass

class B(unittest.TestCase):
    @classmethod
    def setUpClass(cls): raise OSError("no class")
    def test_never(self): pass
"""


@pytest.fixture
def ready() -> None:
    what = suite.needed("kernel", False)
    if what:
        missing(what)


@pytest.mark.usefixtures("ready")
def test_every_end_of_a_test_is_told(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(MODULE)
    got = suite.play("told", "kernel", tmp_path / "run" / "told", limit_s=2, PYTHONPATH=str(tmp_path))
    assert {t.rpartition("test_")[2]: outcome for t, (outcome, _) in got.items()} == {
        "1_good": "ok",
        "2_bad": "fail",
        "3_hangs": "hang",
        "4_raises": "error",
        "5_ends_the_process": "ended with 7",
        "6_skipped": "skip",
        "7_part": "fail",
        "8_good": "ok",
        "setUpClass (told.B)": "error",
    }
    assert "test_3_hangs" in got["told.A.test_3_hangs"][1]  # the traceback says where


@pytest.mark.usefixtures("ready")
def test_a_module_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    got = suite.play("no_such_module", "kernel", tmp_path / "run" / "none", limit_s=2)
    assert [outcome for outcome, _ in got.values()] == ["error"]


def test_what_differs() -> None:
    plain = {"a": ("ok", ""), "b": ("fail", "x"), "c": ("skip", "y"), "gone": ("ok", "")}
    ours = {"a": ("ok", "z"), "b": ("fail", "other"), "c": ("ok", ""), "new": ("ok", "")}
    assert suite.differing(plain, ours) == ["c", "gone", "new"]


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.timeout(300)
def test_a_short_run_finds_no_difference(surface: str) -> None:
    argv = [sys.executable, suite.__file__, "--surface", surface, "test_socketserver"]
    done = subprocess.run(argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert "same results" in done.stdout


def test_missing_things_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "SUITE", tmp_path)
    assert any("libpython3.11-testsuite" in what for what in suite.needed("kernel", False))
