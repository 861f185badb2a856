"""Tables and durations for a terminal."""

import textwrap
from collections.abc import Collection, Sequence
from itertools import zip_longest
from typing import Any

LEAST = 6
"""Columns are not made narrower than this."""


def render(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int,
    names: Collection[str] = (),
    texts: Collection[str] = (),
    whole: Collection[str] = (),
) -> str:
    """Returns the table in lines of at most `width` characters.

    Columns of names and texts are aligned to the left, and cut where there is too little room: names in the middle,
    texts at their end. Those of texts that must stay whole go on in a line below. All others are numbers.
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= width else 1
    left = {*names, *texts, *whole}
    may_shrink = [i for i, header in enumerate(headers) if header in left]
    # One character at a time from what is widest then, so that no column is cut while another has more to give.
    while sum(widths) + gap * (len(widths) - 1) > width:
        widest = max(may_shrink, key=lambda i: widths[i])
        if widths[widest] <= LEAST:
            break
        widths[widest] -= 1
    lines = []
    for row in (headers, *rows):
        cells = []
        for header, cell, size in zip(headers, row, widths, strict=True):
            if header in whole:
                cells.append(textwrap.wrap(cell, size, subsequent_indent="  ", break_on_hyphens=False))
            else:
                cells.append([_cut(cell, size, keep_end=header in names) if header in left else cell])
        for line in zip_longest(*cells, fillvalue=""):
            placed = zip(headers, line, widths, strict=True)
            aligned = [cell.ljust(size) if name in left else cell.rjust(size) for name, cell, size in placed]
            lines.append((" " * gap).join(aligned).rstrip())
    return "\n".join(lines)


def _cut(text: str, width: int, keep_end: bool) -> str:
    """Returns the text, with dots in place of what is too long."""
    if len(text) <= width:
        return text
    tail = (width - 2) // 2 if keep_end else 0
    return text[: width - 2 - tail] + ".." + text[len(text) - tail :]


def setting(value: Any) -> str:
    """Writes a setting as it is given on the command line."""
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple | list) else str(value)


def duration(seconds: float | None) -> str:
    """Writes a duration in its largest fitting unit, as in `3.4 h`; nothing for None."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
