# SPDX-License-Identifier: Apache-2.0
"""`python -m bypass`: the same as the `bypass` command."""

import sys

from bypass.cli import main

sys.exit(main())
