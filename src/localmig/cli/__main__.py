"""`python -m localmig.cli` is `localmig`."""

import sys

from localmig.cli import main

sys.exit(main())
