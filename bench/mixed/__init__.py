# SPDX-License-Identifier: Apache-2.0
"""A mixed load with Linux at the other end of a veth, both as client and as server; `python -m bench.mixed`.

worlds.py: how an end opens and takes connections; talk.py: short conversations; web.py: an HTTP client; end.py: one end
as a process; leftovers.py: what may not be left; __main__.py: the run and its verdict. iperf3 is bench/iperf3.py.
"""
