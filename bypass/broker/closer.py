# SPDX-License-Identifier: Apache-2.0
"""Closing descriptors that somebody passed and of which nothing is known.

close(2) of a file of a file system in user space waits until that file system answers, which may be never. So it is
done in a thread that nobody waits for, and whose users have too many of these under way are not listened to.
"""

from __future__ import annotations

import os
import threading
from collections import Counter

MAX_PENDING = 8


class Closer:
    """Closes descriptors without waiting, and counts by user what does not come to an end."""

    def __init__(self) -> None:
        self._pending: Counter[int] = Counter()
        self._lock = threading.Lock()

    def close(self, fd: int, uid: int) -> None:
        with self._lock:
            self._pending[uid] += 1
        threading.Thread(target=self._close, args=(fd, uid), name=f"close {fd}", daemon=True).start()

    def _close(self, fd: int, uid: int) -> None:
        try:
            os.close(fd)
        finally:
            with self._lock:
                self._pending[uid] -= 1
                if not self._pending[uid]:
                    del self._pending[uid]

    def exhausted(self, uid: int) -> bool:
        """This user has as many under way as it may have."""
        return self._pending[uid] >= MAX_PENDING
