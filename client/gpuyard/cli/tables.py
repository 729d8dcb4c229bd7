"""Tables for people: columns under headings, fitted to a terminal; whole and without colour for everything else.

A terminal that is too narrow costs the least that can be missed: first the last column, which holds words, is folded,
or goes below its row; then names are cut; and where even that is too wide, each row becomes a list of its fields.
Numbers and states are never cut. Columns keep their order, so that what a pipe gets can be picked apart.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len

#: SGR codes of the words of a state.
STATE_COLOURS = {
    "running": "32", "starting": "36", "suspended": "35", "stopping": "33", "pending": "33", "succeeded": "2",
    "failed": "31", "cancelled": "2", "ready": "32", "suspected": "33", "joining": "36", "lost": "31",
    "incompatible": "31", "cordoned": "33", "draining": "33",
}  # fmt: skip
_BOLD = "1"
_GAP = "  "
#: The last column is folded where it has so much room, and goes below its row where it has less.
FOLDED_MIN = 24
#: What is cut is not cut below this, or below its heading.
CUT_MIN = 8
#: Before what stands below its row.
_BELOW = "    "


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, states: str = "STATE") -> None:
    """Rows under headings. Columns that start with `#` are numbers; the one named `states` is coloured by its words."""
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else 0
    colour = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for line in table_lines(columns, rows, width=width, colour=colour, states=states):
        sys.stdout.write(line + "\n")


def table_lines(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, width: int = 0, colour: bool = False, states: str = ""
) -> Iterator[str]:
    """The table's lines; `width` 0: as wide as it is."""
    table = _Table(columns, rows, states)
    fitted = table.fit(width) if width else table.widths
    if fitted is None:
        yield from table.lists(colour)
        return
    last_width = 0
    if width and table.total(fitted) > width:
        room = width - table.total(fitted[:-1]) - len(_GAP)
        last_width = room if room >= FOLDED_MIN else -1
    yield from table.lines(fitted, last_width, width, colour)


class _Table:
    """Cells and their natural widths."""

    def __init__(self, columns: Sequence[str], rows: Iterable[Sequence[str]], states: str) -> None:
        self.headings = [column.removeprefix("#") for column in columns]
        self.is_number = [column.startswith("#") for column in columns]
        self.is_state = [column == states for column in columns]
        self.rows = [[_printable(cell) for cell in row] for row in rows]
        self.widths = [max(map(cell_len, cells)) for cells in zip(self.headings, *self.rows, strict=True)]

    def total(self, widths: Sequence[int]) -> int:
        return sum(widths) + len(_GAP) * (len(widths) - 1)

    def fit(self, width: int) -> list[int] | None:
        """Widths with which all but the last column stay within `width`; None where nothing helps."""
        widths = list(self.widths)
        if self.is_number[-1] and self.total(widths) > width:
            return None
        while self.total(widths[:-1]) > width:
            able = [place for place in range(len(widths) - 1) if widths[place] > self._least(place)]
            if not able:
                return None
            widths[max(able, key=lambda place: widths[place])] -= 1
        return widths

    def _least(self, place: int) -> int:
        if self.is_number[place] or self.is_state[place]:
            return self.widths[place]
        return max(CUT_MIN, cell_len(self.headings[place]))

    def lines(self, widths: list[int], last_width: int, width: int, colour: bool) -> Iterator[str]:
        """`last_width`: what the last column is folded to; 0: whole; below 0: under its row."""
        is_below = last_width < 0
        yield self._row(self.headings[:-1] if is_below else self.headings, widths, colour, _BOLD)
        for row in self.rows:
            *cells, last = row
            if is_below:
                yield self._row(cells, widths, colour)
                yield from textwrap.wrap(last, width, initial_indent=_BELOW, subsequent_indent=_BELOW)
                continue
            first, *more = textwrap.wrap(last, last_width) if last_width and last else [last]
            yield self._row([*cells, first], widths, colour)
            indent = " " * (self.total(widths[:-1]) + len(_GAP))
            yield from (indent + line for line in more)

    def _row(self, cells: Sequence[str], widths: list[int], colour: bool, style: str = "") -> str:
        shown = [self._cell(place, cell, widths[place], colour, style) for place, cell in enumerate(cells)]
        return _GAP.join(shown).rstrip()

    def _cell(self, place: int, cell: str, width: int, colour: bool, style: str) -> str:
        text = _cut(cell, width) if place < len(self.headings) - 1 else cell
        pad = " " * max(0, width - cell_len(text))
        code = style or (STATE_COLOURS.get(cell, "") if self.is_state[place] else "")
        painted = f"\x1b[{code}m{text}\x1b[0m" if colour and code and text else text
        return pad + painted if self.is_number[place] else painted + pad

    def lists(self, colour: bool) -> Iterator[str]:
        """Each row as lines of `HEADING  cell`, what is empty left out."""
        widest = max(map(cell_len, self.headings))
        for number, row in enumerate(self.rows):
            if number:
                yield ""
            for place, cell in enumerate(row):
                if cell:
                    heading = self.headings[place]
                    pad = " " * (widest - cell_len(heading))
                    name = self._cell(place, heading, cell_len(heading), colour, _BOLD)
                    yield f"{name}{pad}{_GAP}{self._cell(place, cell, cell_len(cell), colour, '')}"


def _printable(text: str) -> str:
    """Without what would steer the terminal: reasons quote what jobs and nodes say."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) > width - 1:
        text = text[:-1]
    return text + "…"
