"""`python -m workbench` is the command line, also for launchers: `accelerate launch -m workbench extract ...`."""

import sys

from workbench.cli import main

sys.exit(main())
