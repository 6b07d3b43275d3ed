"""`python -m fms`: the `fms` command."""

import sys

from fms.cli import main

sys.exit(main())
