"""Tables, numbers and sizes as people read them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), spaced: bool = False) -> str:
    """Rows under their columns; those named in `right` are aligned there. Nothing is cut: a terminal breaks a long last cell at its edge.

    With `spaced` a row may have several lines, and an empty one is between two.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        shown.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    for number, row in enumerate(rows):
        row = row if spaced else [cell.replace("\n", "\\n") for cell in row]
        shown.add_row(*(Text(f"{printable(cell)}\n" if spaced and number < len(rows) - 1 else printable(cell)) for cell in row))
    printed = io.StringIO()
    Console(file=printed, width=10**6, color_system=None).print(shown, crop=False)
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())


def printable(text: str) -> str:
    """The text with what a terminal would obey, or could not show, escaped; line feeds stay.

    >>> print(printable("red" + chr(27) + "[31m"))
    red\\x1b[31m
    """
    return "".join(char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text)


def number(value: Any) -> str:
    """A number as people read it.

    >>> number(0.98333), number(1e-7), number(12), number(float("nan"))
    ('0.9833', '1e-07', '12', 'nan')
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def size(count: int) -> str:
    """A number of bytes as people read it.

    >>> size(512), size(1_400_000)
    ('512 B', '1.4 MB')
    """
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count) / 3 + 1e-12), 4)
    value = count / 1000**power
    return f"{value:.{0 if value >= 99.95 else 1}f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def age(seconds: float) -> str:
    """A time that has gone by, in a unit of which it has two at least.

    >>> age(5), age(150), age(90_000)
    ('5 s', '2 min', '25 h')
    """
    for unit, length in {"d": 86400, "h": 3600, "min": 60}.items():
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
