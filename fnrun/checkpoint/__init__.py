"""Checkpoints: whole training states on disk, each whole or not there, and never a wrong bit.

directory.py    Checkpoints: saving, restoring, deleting
listing.py      which checkpoints lie in a directory, which one is meant, what their manifests say
restoring.py    one checkpoint as a state
retention.py    which is the best, and which may go
handed.py       whether tensors are written to while they are saved
background.py   the thread behind the training
codec.py        a pytree as structure and leaves, and built from them again
match.py        a saved structure against a fresh state: what to restore, or a table of what differs
manifest.py     the manifest: structure, leaves, pieces, metrics
former.py       manifests of earlier formats
store.py        its files, read and checked
writing.py      its files, written
pieces.py       the bytes of a piece and their digest
orbax.py        the files that make the arrays a checkpoint of orbax; format 1
foreign.py      the files of other frameworks
weights.py      fine-tuning from, and exporting to, a state dict
"""

from fnrun.checkpoint.directory import Checkpoints
from fnrun.checkpoint.foreign import params_from
from fnrun.checkpoint.manifest import CheckpointError, DamagedError, Manifest
from fnrun.checkpoint.retention import Which
from fnrun.checkpoint.weights import export, load_from
from fnrun.core.checkpoint_name import Entry

__all__ = ["CheckpointError", "Checkpoints", "DamagedError", "Entry", "Manifest", "Which", "export", "load_from", "params_from"]
