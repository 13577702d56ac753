# SPDX-License-Identifier: Apache-2.0
"""One module of CPython's test suite, test by test: started by tests/cpython_suite.py under Debian's interpreter.

    python3 cpython_child.py MODULE RECORD LIMIT_S [--only ID ...]

To the file RECORD go lines of JSON: {"begin": id} before a test, {"end": id, "outcome": ..., "text": ...} after it,
{"done": true} at the very end. What RECORD has already is not run again: after a test that hung or ended the process,
the next start goes on behind it. A test that takes longer than LIMIT_S ends the process, with a traceback.

Only what the standard library has is used here.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import unittest
from collections.abc import Iterator
from typing import Any


class Record:
    """Written by system calls that tests do not replace; opened anew each time, as tests close descriptors."""

    def __init__(self, path: str) -> None:
        self._path = path

    def seen(self) -> set[str]:
        if not os.path.exists(self._path):
            return set()
        with open(self._path) as lines:
            return {line["begin"] for line in map(json.loads, lines) if "begin" in line}

    def add(self, **what: Any) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.write(fd, json.dumps(what).encode() + b"\n")
        os.close(fd)


class Result(unittest.TestResult):
    def __init__(self, record: Record, limit_s: float) -> None:
        super().__init__()
        self._record, self._limit_s = record, limit_s
        self._outcome, self._text = "ok", ""

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._outcome, self._text = "ok", ""
        self._began = time.monotonic()
        self._record.add(begin=test.id())
        faulthandler.dump_traceback_later(self._limit_s, exit=True, file=sys.__stderr__)

    def stopTest(self, test: unittest.TestCase) -> None:
        faulthandler.cancel_dump_traceback_later()
        super().stopTest(test)
        self._record.add(
            end=test.id(),
            outcome=self._outcome,
            text=self._text,
            took=round(time.monotonic() - self._began, 3),
        )

    def _note(self, test: Any, outcome: str, text: str) -> None:
        if not isinstance(test, unittest.TestCase):  # setUpClass(), setUpModule(): no test was begun
            self._record.add(end=test.id(), outcome=outcome, text=text)
        elif self._outcome == "ok":
            self._outcome, self._text = outcome, text

    def addError(self, test: Any, err: Any) -> None:
        self._note(test, "error", self._exc_info_to_string(err, test))

    def addFailure(self, test: Any, err: Any) -> None:
        self._note(test, "fail", self._exc_info_to_string(err, test))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._note(test, "fail", self._exc_info_to_string(err, test))

    def addSkip(self, test: Any, reason: str) -> None:
        self._note(test, "skip", reason)

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self._note(test, "expected failure", "")

    def addUnexpectedSuccess(self, test: Any) -> None:
        self._note(test, "unexpected success", "")


def flat(suite: Any) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestCase):
            yield test
        else:
            yield from flat(test)


def main() -> None:
    module, path, limit_s, *rest = sys.argv[1:]
    only = set(rest[1:]) if rest[:1] == ["--only"] else None
    try:
        from test import support

        support.use_resources = ["network"]  # of which there is only the loopback
    except ImportError:
        pass  # a module of somebody else's
    record = Record(path)
    before = record.seen()
    try:
        suite = unittest.defaultTestLoader.loadTestsFromName(module)
    except unittest.SkipTest as e:  # for another system
        record.add(end=module, outcome="skip", text=str(e))
        record.add(done=True)
        return
    tests = [t for t in flat(suite) if t.id() not in before and (only is None or t.id() in only)]
    unittest.TestSuite(tests).run(Result(record, float(limit_s)))
    record.add(done=True)
    sys.stdout.flush()
    os._exit(0) if any_thread_left() else None


def any_thread_left() -> bool:
    """A thread of a failed test would keep the process for ever."""
    import threading

    return any(t is not threading.main_thread() and not t.daemon for t in threading.enumerate())


if __name__ == "__main__":
    main()
