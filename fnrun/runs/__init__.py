"""Runs: directories that hold a training, and what can be said and proven of them.

run.py       a run: made, opened, its history; and what an experiment is
config.py    its config: read, checked, compared
writer.py    who writes to it
curves.py    its curves, read from its log; plot.py: as a picture, and as text
summary.py   what it came to, in print
verify.py    a run, replayed and proven
"""
