# SPDX-License-Identifier: Apache-2.0
"""The reaper: `build/bypass-linger` drives the stack of an application whose last process has ended, as its user.

It is a relative like any other: it says hello with the token that its environment holds, and ends when nothing is left
to do.
"""

from __future__ import annotations

import errno
import os
import subprocess

from bypass.app import linger_program
from bypass.broker.apps import App

START_S = 5


def start_reaper(app: App, name: str) -> int:
    """Its process number; it has begun.

    Args:
        app: whose stack it drives.
        name: of the broker's socket.

    Raises:
        BypassError, OSError: it cannot be started.
    """
    environ = {
        "BYPASS_SOCKET": name,
        "BYPASS_APP": f"{app.number}:{app.token.hex()}",
        "BYPASS_PROCNAME": app.name,
    }
    mine = os.geteuid() != 0
    # The shell ends at once and tells whose parent it was: nobody has to wait for the reaper.
    command = 'exec 3>&1 >/dev/null; "$0" <&- 2>/dev/null 3>&- & echo $! >&3'
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", command, str(linger_program())],
            env=environ,
            cwd="/",
            stdout=subprocess.PIPE,
            check=True,
            timeout=START_S,
            user=None if mine else app.user.uid,
            group=None if mine else app.user.gid,
            extra_groups=None if mine else sorted(app.user.groups),
        )
    except subprocess.SubprocessError as e:
        raise OSError(errno.ECHILD, f"the reaper cannot be started: {e}") from e
    return int(done.stdout)
