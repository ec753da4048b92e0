"""What a count is: a whole number that is not below its least."""

from __future__ import annotations

import operator
from typing import Any


def count(what: str, value: Any, least: int = 1, unit: str = "") -> int:
    """`value` as an int, `what` says whose option it is. Any integer will do, NumPy's too; a bool, a fraction, a NaN or None will not.

    Raises ValueError where it is no whole number or below `least`.

    >>> count("log: every", 50)
    50
    >>> count("log: every", 2.5)
    Traceback (most recent call last):
    ValueError: log: every is a whole number of at least 1, not 2.5
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{what} is a whole number of at least {least}{unit}, not {value!r}")
    if number < least:
        raise ValueError(f"{what} is at least {least}{unit}, not {value!r}")
    return number
