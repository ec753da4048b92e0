"""Tables, numbers and sizes as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), spaced: bool = False) -> str:
    """Rows under their columns; those named in `right` are aligned there. Nothing is cut: a terminal breaks a long last cell at its edge.

    With `spaced` a row may have several lines, and an empty one is between two.
    """
    from rich.cells import cell_len  # a terminal gives some letters two places

    header = [column.split("\n") for column in columns]
    height = max(map(len, header), default=0)
    lines = [[[""] * (height - len(cell)) + cell for cell in header]]
    for row in rows:
        lines.append([printable(cell).split("\n") if spaced else [printable(cell).replace("\n", "\\n")] for cell in row])
    widths = [max(cell_len(line) for row in lines for line in row[i]) for i in range(len(columns))]

    def laid_out(row: list[list[str]]) -> list[str]:
        shown = []
        for parts in zip_longest(*row, fillvalue=""):
            cells = [
                " " * (width - cell_len(part)) + part if column in right else part + " " * (width - cell_len(part))
                for part, width, column in zip(parts, widths, columns, strict=True)
            ]
            shown.append("  ".join(cells).rstrip())
        return shown

    head, *body = map(laid_out, lines)
    between = [""] if spaced else []
    return "\n".join(
        [*head, "─" * (sum(widths) + 2 * (len(widths) - 1)), *chain(*(part for row in body for part in (row, between)))]
    ).rstrip("\n")


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


def clock_time(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`, `2 days, 3:04:05`.

    >>> [clock_time(s) for s in (7.4, 754, 3723)]
    ['0:07', '12:34', '1:02:03']
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days} day{'s' * (days > 1)}, {text}" if days else text
