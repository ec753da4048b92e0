"""Plain data as documents: what JSON has no word for, and names with dots."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_DECIMAL = 14_000  # bits: fewer than the 4,300 digits, and more than any program reads as a number


def jsonable(value: Any) -> Any:
    """`value` in what JSON has: NaN and infinities are the strings that `float` reads, bytes are hexadecimals.

    Integers of more digits than Python writes in decimals are strings in hexadecimals.

    >>> jsonable({"loss": float("nan"), 1: (2.5, float("-inf"), b"a")})
    {'loss': 'NaN', '1': [2.5, '-Infinity', '61']}
    """
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if type(value) is int and value.bit_length() > _DECIMAL:
        return hex(value)
    return value.hex() if isinstance(value, bytes) else value


def dotted(value: Any, containers: tuple[type, ...] = (dict, list), name: str = "") -> Iterator[tuple[str, Any]]:
    """Each value within the containers, by its name with dots; an empty container is a value.

    >>> dict(dotted({"lr": 0.1, "model": {"widths": [8, 16], "extra": {}}}))
    {'lr': 0.1, 'model.widths.0': 8, 'model.widths.1': 16, 'model.extra': {}}
    """
    if isinstance(value, containers) and (value or not name):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from dotted(item, containers, f"{name}.{key}" if name else str(key))
    else:
        yield name, value
