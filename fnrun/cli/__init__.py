"""Command lines: experiment.py makes that of an experiment (`fnrun.main`), commands/ is the command `fnrun`."""
