"""`python -m fnrun` is the command `fnrun`."""

import sys

from fnrun.cli.commands import main

sys.exit(main())
