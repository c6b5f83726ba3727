"""`python -m probekit`, the same as the command `probekit`."""

import sys

from probekit.cli import main

sys.exit(main())
