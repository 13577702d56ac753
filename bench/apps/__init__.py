# SPDX-License-Identifier: Apache-2.0
"""Programs from Debian, unmodified, on the kernel and on bypass: do they work? (`python -m bench.apps`)

place.py    where Debian's programs are; a lab with a folder that an unprivileged user may use
launch.py   how a program is started: on the kernel, or on bypass
proof.py    who served: the kernel of the server's namespace, or not
app.py      what every program's module has
redis.py, nginx.py, memcached.py, postgres.py, python_web.py, iperf.py, curl.py
"""
