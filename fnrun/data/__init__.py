"""Data: from a position to the batches from there on."""

from fnrun.data.arrays import Arrays, arrays
from fnrun.data.order import permutation
from fnrun.data.stream import Batches, Listed, OnDevice, as_batches, batches

__all__ = ["Arrays", "Batches", "Listed", "OnDevice", "arrays", "as_batches", "batches", "permutation"]
