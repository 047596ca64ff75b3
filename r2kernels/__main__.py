"""`python -m r2kernels`: the command line."""

import sys

from .cli import main

sys.exit(main())
