"""`python -m probekit`, the same as the command `probekit`."""

from __future__ import annotations

import sys

from probekit.cli import main

sys.exit(main())
