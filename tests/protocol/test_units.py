"""Quantities: what people may write, what it becomes, and how it is printed again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard_protocol.units import (
    Cpus,
    Duration,
    GpuWish,
    Memory,
    MigProfile,
    Quantity,
    Share,
    format_mib,
    format_milli,
    format_ms,
)

SECOND, MINUTE, HOUR, DAY = 1000, 60_000, 3_600_000, 86_400_000


@pytest.mark.parametrize(
    ("kind", "written", "amount"),
    [
        (Memory, "5Gi", 5120),
        (Memory, "5GiB", 5120),
        (Memory, " 5 gi ", 5120),
        (Memory, "512Mi", 512),
        (Memory, "1.5Ti", 1_572_864),
        (Memory, "80GB", 76_294),  # rounded up: a card of 80 GB has at least that
        (Memory, "80G", 76_294),
        (Memory, "1", None),
        (Memory, "1Ki", 1),
        (Memory, "0Mi", 0),
        (Share, 0.3, 300),
        (Share, "0.3", 300),
        (Share, "30%", 300),
        (Share, "12.5%", 125),
        (Share, 1, 1000),
        (Share, "0.001", 1),
        (Cpus, 4, 4000),
        (Cpus, "4", 4000),
        (Cpus, 0.5, 500),
        (Cpus, "500m", 500),
        (Cpus, 0, 0),
        (Duration, "90s", 90 * SECOND),
        (Duration, "1h30m", 90 * MINUTE),
        (Duration, "1h 30m", 90 * MINUTE),
        (Duration, "500ms", 500),
        (Duration, "2min", 2 * MINUTE),
        (Duration, "1w", 7 * DAY),
        (Duration, "01:30:00", 90 * MINUTE),
        (Duration, "90:00", 90 * MINUTE),
        (Duration, "1-12:00:00", 36 * HOUR),
        (Duration, "1-12:00", 36 * HOUR),
        (Duration, "1-12", 36 * HOUR),
        (Duration, "100:00:00", 100 * HOUR),
    ],
)
def test_what_people_write_becomes_an_integer(kind: type[Quantity], written: object, amount: int | None) -> None:
    if amount is None:
        with pytest.raises(ValueError, match="expected"):
            kind.parse(written)  # type: ignore[arg-type]  # a table of several kinds
    else:
        parsed = kind.parse(written)  # type: ignore[arg-type]  # as above
        assert (type(parsed), int(parsed)) == (kind, amount)


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        (Memory, 5),
        (Memory, True),
        (Memory, "5"),
        (Memory, "5 apples"),
        (Memory, "-5Gi"),
        (Memory, "5e3Gi"),
        (Memory, "Gi"),
        (Memory, ""),
        (Memory, "٥Gi"),
        (Memory, "999999999999Ti"),
        (Share, 0),
        (Share, "0"),
        (Share, 1.001),
        (Share, "101%"),
        (Share, -0.5),
        (Share, 0.0001),
        (Share, "0.1%%"),
        (Share, "half"),
        (Share, True),
        (Share, float("nan")),
        (Share, float("inf")),
        (Share, 0.1 + 0.2),
        (Cpus, -1),
        (Cpus, "4 cores"),
        (Cpus, "1.5m"),
        (Cpus, False),
        (Cpus, "0.0001"),
        (Duration, 90),
        (Duration, "90"),
        (Duration, ""),
        (Duration, "1h30"),
        (Duration, "1x"),
        (Duration, "-1h"),
        (Duration, "01:60:00"),
        (Duration, "1-12:00:60"),
        (Duration, "90:60"),
        (Duration, "999999999999w"),
        (Duration, "90s\n90"),
    ],
)
def test_a_guess_is_refused_with_what_was_found_and_expected(kind: type[Quantity], written: object) -> None:
    with pytest.raises(ValueError, match=r"found .*; expected "):
        kind.parse(written)  # type: ignore[arg-type]  # wrong types are the point


@given(st.integers(0, 2**40))
def test_memory_reads_what_it_prints(mib: int) -> None:
    assert Memory.parse(str(Memory(mib))) == mib
    assert format_mib(mib) == str(Memory(mib))


@given(st.integers(1, 1000))
def test_a_share_reads_what_it_prints(milli: int) -> None:
    assert Share.parse(str(Share(milli))) == milli
    assert Share.parse(milli / 1000) == milli


@given(st.integers(0, 10**11))
def test_cpus_read_what_they_print(milli: int) -> None:
    assert Cpus.parse(str(Cpus(milli))) == milli


@given(st.integers(0, Duration.MOST))
def test_a_duration_reads_what_it_prints(milliseconds: int) -> None:
    assert Duration.parse(str(Duration(milliseconds))) == milliseconds


@given(st.integers(0, 99_999), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_slurm_clock_times_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    total = days * DAY + hours * HOUR + minutes * MINUTE + seconds * SECOND
    written = f"{days}-{hours:02}:{minutes:02}:{seconds:02}"
    if total <= Duration.MOST:
        assert Duration.parse(written) == total
    else:
        with pytest.raises(ValueError, match="at most"):
            Duration.parse(written)


@given(st.sampled_from([Memory, Share, Cpus, Duration]), st.text() | st.integers() | st.floats() | st.booleans())
def test_any_text_is_an_amount_or_a_value_error(kind: type[Quantity], written: str | float) -> None:
    try:
        parsed = kind.parse(written)
    except ValueError:
        return
    assert 0 <= parsed <= kind.MOST


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [(0, "0s"), (5_400_000, "1h30m"), (1500, "1s500ms"), (999, "999ms"), (-5000, "-5s"), (DAY, "1d")],
)
def test_durations_are_printed_for_people(milliseconds: int, shown: str) -> None:
    assert format_ms(milliseconds) == shown


@pytest.mark.parametrize(("milli", "shown"), [(300, "0.3"), (2000, "2"), (1, "0.001"), (1250, "1.25"), (0, "0")])
def test_thousandths_are_printed_for_people(milli: int, shown: str) -> None:
    assert format_milli(milli) == shown


def test_quantities_show_their_kind_and_unit() -> None:
    assert [repr(Memory(5120)), repr(Duration(1000))] == ["Memory('5Gi')", "Duration('1s')"]


@pytest.mark.parametrize("written", ["1g.10gb", "1g.10gb+me", "1c.3g.40gb", "7g.80gb", " 1G.10GB ", "1g.10gb+me.all"])
def test_mig_profiles_are_read_as_the_driver_prints_them(written: str) -> None:
    assert MigProfile.parse(written) == written.strip().lower()


@pytest.mark.parametrize("written", ["", "1g", "10gb", "1g.10", "g.gb", "1g.10gb\nx", 1, None, "1g.10gb+"])
def test_other_words_are_no_mig_profile(written: object) -> None:
    with pytest.raises(ValueError, match=r"found .*; expected a MIG profile"):
        MigProfile.parse(written)


@pytest.mark.parametrize(
    ("written", "models", "memory_mib", "cards"),
    [
        ("H100", ("H100",), 0, None),
        ("A100:80GB", ("A100",), 76_294, None),
        ("A100:80GB:4", ("A100",), 76_294, 4),
        ("A100:4:80GB", ("A100",), 76_294, 4),
        ("H100|A100:2", ("A100", "H100"), 0, 2),
        ("RTX 4090", ("RTX 4090",), 0, None),
    ],
)
def test_a_wish_names_models_memory_and_count(
    written: str, models: tuple[str, ...], memory_mib: int, cards: int | None
) -> None:
    wish = GpuWish.parse(written)
    assert (str(wish), wish.models, wish.memory_mib, wish.cards) == (written, models, memory_mib, cards)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "4",
        "A100:0",
        "A100:2:4",
        "A100:80GB:40GB",
        "A100||H100",
        "A100:",
        "A100:x",
        "A100\n|H100",
        4,
        "A100:2048",
        "A:²",
    ],
)
def test_other_words_are_no_wish(written: object) -> None:
    with pytest.raises(ValueError, match=r"found .*; expected "):
        GpuWish.parse(written)


@given(st.text())
def test_any_text_is_a_wish_that_can_be_read_or_a_value_error(written: str) -> None:
    try:
        wish = GpuWish.parse(written)
    except ValueError:
        return
    assert wish.models
    assert wish.memory_mib >= 0
    assert wish.cards is None or wish.cards > 0
