"""Data: from a position to the batches from there on."""

from fnrun.data.arrays import Arrays, arrays
from fnrun.data.loader import Loader, loader
from fnrun.data.order import permutation
from fnrun.data.stateful import Stateful, stateful
from fnrun.data.stream import Batches, Listed, OnDevice, as_batches, batches

__all__ = [
    "Arrays",
    "Batches",
    "Listed",
    "Loader",
    "OnDevice",
    "Stateful",
    "arrays",
    "as_batches",
    "batches",
    "loader",
    "permutation",
    "stateful",
]
