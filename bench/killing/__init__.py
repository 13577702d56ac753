# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments under load (`python -m bench.killing`): what do peers see, how soon, and what is left?

client.py   the peers: new connections all the time, and kept ones; on the kernel's side, a program of its own
judge.py    what they saw, against what has to happen
worlds.py   who serves, and whom one can kill
residue.py  what a world may not leave behind
"""
