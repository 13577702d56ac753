# SPDX-License-Identifier: Apache-2.0
"""What unmodified programs cost on the kernel and on bypass, in turn, on the same two cores: `python -m bench.versus`.

servers.py  the programs and the request that each is asked
cores.py    whose processor time is whose: interfaces received by threads that are pinned
rounds.py   runs all of it, and what comes of it
"""
