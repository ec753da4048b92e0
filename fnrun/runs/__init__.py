"""Runs: directories that hold a training, their curves and their proof.

run.py       Run: making, opening and writing to one; Experiment
config.py    config.yaml, read and written; configs checked, decoded, compared
writer.py    the one process that writes to a run, and its status
curves.py    its curves, read from its log; plot.py: as a picture, and as text
summary.py   its best and last metrics and the next commands, printed
verify.py    a run, replayed and proven
"""
