"""Opening trace files and naming what is wrong with one: file, line, column.

Knows no format. A reader asks a `Row` for typed columns; every refusal is a `TraceError` that a person can act on.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

#: Where the public traces live, by the format's name: repository and folder.
SOURCES = {
    "openb": "github.com/alibaba/clusterdata, cluster-trace-gpu-v2023/csv",
    "muri": "github.com/Rivendile/Muri, simulator and testbed traces",
    "philly": "github.com/msr-fiddle/philly-traces (the filtered copy: pollux/pollux_simulator/traces/philly.csv)",
    "chronus": "github.com/S-Lab-System-Group/ChronusArtifact",
    "azure_llm": "github.com/Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_conv.csv",
    "mooncake": "github.com/kvcache-ai/Mooncake, FAST25-release/traces",
}

FOLDER_VARIABLE = "GPUYARD_TRACES"


class TraceError(Exception):
    """A trace file cannot be read; the text says which, where and why."""


class TraceMissing(TraceError):
    """The file is not there; the text says where to get it."""


def traces_folder(given: str | None = None) -> Path | None:
    """The folder of the public traces: the argument, else the environment's; None if neither is set."""
    text = given or os.environ.get(FOLDER_VARIABLE, "")
    return Path(text) if text else None


def locate(text: str, source: str, folder: str | None = None) -> Path:
    """A file by path, or by its path below the folder of traces; `TraceMissing` names where to download it."""
    path = Path(text)
    tried = [path]
    root = traces_folder(folder)
    if root is not None and not path.is_absolute():
        tried.append(root / path)
    for candidate in tried:
        for name in (candidate, candidate.with_name(candidate.name + ".gz")):
            if name.is_file():
                return name
    where = ", ".join(str(candidate) for candidate in tried)
    raise TraceMissing(
        f"no trace file at {where}. Download it from {SOURCES.get(source, 'its publisher')} and give its path, "
        f"or set {FOLDER_VARIABLE} to the folder that holds it."
    )


def open_text(path: Path) -> TextIO:
    """A plain or gzipped file as text, told apart by its first bytes, not by its name."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    if zipped:
        return cast("TextIO", gzip.open(path, "rt", encoding="utf-8", newline=""))
    return path.open(encoding="utf-8", newline="")


class Row:
    """One line of a CSV file."""

    __slots__ = ("_cells", "line", "path")

    def __init__(self, path: Path, line: int, cells: dict[str, str]) -> None:
        self.path = path
        self.line = line
        self._cells = cells

    def wrong(self, column: str, expected: str) -> TraceError:
        found = self._cells.get(column)
        return TraceError(f"{self.path}, line {self.line}, column {column}: found {found!r}; expected {expected}")

    def text(self, column: str) -> str:
        return self._cells.get(column) or ""

    def whole(self, column: str, *, least: int = 0, most: int | None = None) -> int:
        bounds = f"a whole number of at least {least}" + (f" and at most {most}" if most is not None else "")
        try:
            value = int(self._cells[column])
        except (ValueError, TypeError):
            raise self.wrong(column, bounds) from None
        if value < least or (most is not None and value > most):
            raise self.wrong(column, bounds)
        return value

    def number(self, column: str, *, least: float = 0.0) -> float:
        try:
            value = float(self._cells[column])
        except (ValueError, TypeError):
            raise self.wrong(column, f"a number of at least {least:g}") from None
        if not least <= value < float("inf"):
            raise self.wrong(column, f"a number of at least {least:g}")
        return value


def rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """The lines of a CSV file with a header; missing columns and broken lines are refused by name."""
    try:
        with open_text(path) as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or ()
            missing = [column for column in columns if column not in header]
            if missing:
                raise TraceError(
                    f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(header) or 'an empty file'}"
                )
            for cells in reader:
                if None in cells.values() or None in cells:
                    raise TraceError(f"{path}, line {reader.line_num}: expected {len(header)} columns")
                yield Row(path, reader.line_num, cells)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, csv.Error) as problem:
        raise TraceError(f"{path}: not a readable CSV file: {problem}") from problem
