"""Tables at every width: what a pipe gets is whole, and what a terminal shows fits it."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from gpuyard.cli.tables import table_lines

COLUMNS = ("#JOB", "NAME", "USER", "STATE", "WANTS", "SUBMITTED", "#TIME", "NODES OR REASON")
LONG = "a-rather-long-name-for-a-gang-that-runs"
REASON = "fewer than 8 such cards free (on 2 of 2 nodes)"
ROWS = [
    ("55[15 left]", "", "alice", "pending", "2×GPU", "6s ago", "", REASON),
    ("52", "frac", "alice", "running", "3 × (0.3×GPU (soft))", "9s ago", "9s", "node-2"),
    ("51", LONG, "alice", "running", "4 × (3×GPU)", "10s ago", "10s", "node-2,node-1"),
]


def lines(width: int = 0, *, colour: bool = False) -> list[str]:
    return list(table_lines(COLUMNS, ROWS, width=width, colour=colour, states="STATE"))


def test_a_pipe_gets_everything_in_one_line_each() -> None:
    assert lines() == [
        "        JOB  NAME                                     USER   STATE    WANTS                 SUBMITTED  TIME"
        "  NODES OR REASON",
        "55[15 left]                                           alice  pending  2×GPU                 6s ago"
        "           fewer than 8 such cards free (on 2 of 2 nodes)",
        "         52  frac                                     alice  running  3 × (0.3×GPU (soft))  9s ago       9s"
        "  node-2",
        "         51  a-rather-long-name-for-a-gang-that-runs  alice  running  4 × (3×GPU)           10s ago     10s"
        "  node-2,node-1",
    ]


def test_the_last_column_is_folded_where_it_has_room() -> None:
    found = lines(140)
    assert LONG in found[-1]
    assert [line.strip() for line in found[1:3]][1] == "(on 2 of 2 nodes)"


def test_at_80_columns_numbers_and_states_are_whole_and_reasons_stand_below() -> None:
    found = lines(80)
    assert found[1:3] == [
        "55[15 left]                    alice  pending  2×GPU             6s ago",
        "    fewer than 8 such cards free (on 2 of 2 nodes)",
    ]
    assert "a-rather-long-n…" in found[-2]
    assert found[-1] == "    node-2,node-1"


def test_where_nothing_helps_each_row_is_a_list() -> None:
    found = lines(40)
    assert found[:3] == ["JOB              55[15 left]", "USER             alice", "STATE            pending"]
    assert found.count("") == len(ROWS) - 1


@pytest.mark.parametrize("width", range(60, 160))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    found = lines(width)
    if found[0].startswith("JOB  "):  # a list
        return
    assert max(map(cell_len, found)) <= width
    assert all(state in "\n".join(found) for state in ("pending", "running", "10s", "55[15 left]"))


def test_a_table_that_ends_in_numbers_is_never_cut() -> None:
    rows = [("gpuyard", "243.0", "590.0")]
    assert list(table_lines(("POLICY", "#AVG", "#P99"), rows, width=12)) == [
        "POLICY  gpuyard",
        "AVG     243.0",
        "P99     590.0",
    ]


def test_colour_is_for_states_alone_and_adds_no_width() -> None:
    plain, coloured = lines(200), lines(200, colour=True)
    assert "\x1b" not in "".join(plain)
    assert "\x1b[33mpending\x1b[0m" in coloured[1]
    assert coloured[1].replace("\x1b[33m", "").replace("\x1b[0m", "") == plain[1]


def test_what_would_steer_the_terminal_is_shown_as_a_mark() -> None:
    assert "\x1b" not in "".join(table_lines(("A", "B"), [("x", "\x1b[2J\n")]))


def test_no_rows_leave_the_headings() -> None:
    assert list(table_lines(("TENANT", "USER"), [], width=80)) == ["TENANT  USER"]
