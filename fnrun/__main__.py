"""`python -m fnrun` is the command `fnrun`."""

import sys

from fnrun.command import main

sys.exit(main())
