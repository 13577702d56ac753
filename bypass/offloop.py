# SPDX-License-Identifier: Apache-2.0
"""Calls into pyroute2's blocking interface, which runs an asyncio loop of its own and so cannot be called from a
thread whose loop is running. `Stack.from_policy()` inside a coroutine is an ordinary thing to write."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def off_loop(func: Callable[P, T]) -> Callable[P, T]:
    """Where the calling thread's event loop is running, func runs in a thread of its own, in the same network
    namespace (a new thread begins in that of its maker), and is waited for."""

    @functools.wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return func(*args, **kwargs)
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(func(*args, **kwargs))
            except BaseException as e:  # noqa: BLE001 - raised again in the caller's thread
                done.set_exception(e)

        thread = threading.Thread(target=run, name=f"bypass-{func.__name__}")
        thread.start()
        thread.join()
        return done.result()

    return call
