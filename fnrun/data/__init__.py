"""Streams of batches: functions from a position to the batches after it.

content        digests that identify data
stream         what a stream is; lists of batches; copies to a device
order          the shuffled order of a pass
arrays         tensors and arrays in memory
ambient        torch's, Python's and NumPy's generators
loader         a data set, in this process or in workers
stateful       iterables with state_dict and load_state_dict
"""

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
