"""What a replica needs, in words and in numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuyard_protocol.resources import (
    Device,
    MigInstance,
    MpsShare,
    NoGpu,
    Partition,
    ResourceNeed,
    TimeSliceShare,
    WholeCards,
    devices_of,
    model_matches,
    share_of,
)


@pytest.mark.parametrize(
    ("need", "words"),
    [
        (ResourceNeed(), "CPU only"),
        (ResourceNeed(gpus=2), "2×GPU"),
        (ResourceNeed(gpus=2, models=("H100",)), "2×H100"),
        (ResourceNeed(mig="1g.10gb"), "1g.10gb"),
        (ResourceNeed(mig="1g.10gb", models=("H100",)), "1g.10gb of H100"),
        (ResourceNeed(share_milli=300), "0.3×GPU (soft)"),
        (ResourceNeed(share_milli=300, share_memory_mib=12288, isolation="none"), "0.3×GPU/12Gi (none)"),
        (ResourceNeed(share_memory_mib=5120), "GPU/5Gi (soft)"),
    ],
)
def test_a_need_says_itself_in_words(need: ResourceNeed, words: str) -> None:
    assert need.describe() == words
    assert need.wants_gpu == (words != "CPU only")


@pytest.mark.parametrize(
    ("need", "share"),
    [
        (ResourceNeed(share_milli=250), (250, 20_480)),
        (ResourceNeed(share_memory_mib=20_480), (250, 20_480)),
        (ResourceNeed(share_memory_mib=1), (1, 1)),
        (ResourceNeed(share_milli=250, share_memory_mib=60_000), (250, 60_000)),
        (ResourceNeed(share_memory_mib=200_000), (1000, 200_000)),
    ],
)
def test_the_dimension_not_asked_follows_the_other(need: ResourceNeed, share: tuple[int, int]) -> None:
    assert share_of(81_920, need) == share


@given(st.integers(0, 1000), st.integers(0, 200_000), st.integers(0, 200_000))
def test_a_share_is_never_more_compute_than_a_card_has(milli: int, memory_mib: int, card_mib: int) -> None:
    got_milli, got_memory = share_of(card_mib, ResourceNeed(share_milli=milli, share_memory_mib=memory_mib))
    assert 0 <= got_milli <= 1000
    assert got_memory == memory_mib or not memory_mib


@pytest.mark.parametrize(
    ("partition", "devices"),
    [
        (NoGpu(), ()),
        (WholeCards(("GPU-a", "GPU-b")), ("GPU-a", "GPU-b")),
        (MpsShare("GPU-a", 300, 1000), ("GPU-a",)),
        (TimeSliceShare("GPU-a", 300, 1000), ("GPU-a",)),
        (MigInstance("GPU-a", "1g.10gb", 0, 1, 9856, 1), ("GPU-a",)),
    ],
)
def test_a_partition_names_its_devices(partition: Partition, devices: tuple[str, ...]) -> None:
    assert devices_of(partition) == devices


@pytest.mark.parametrize(
    ("model", "wanted", "matches"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", True),
        ("NVIDIA H100 80GB HBM3", "h100", True),
        ("NVIDIA H100 80GB HBM3", "H100-80GB", True),
        ("NVIDIA H100 80GB HBM3", "H10", False),
        ("NVIDIA A100-SXM4-80GB", "A100", True),
        ("NVIDIA A100-SXM4-80GB", "A100 PCIe", False),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", True),
    ],
)
def test_a_card_answers_to_whole_words_of_its_name(model: str, wanted: str, matches: bool) -> None:
    assert model_matches(model, wanted) == matches


@pytest.mark.parametrize(
    ("model", "short"), [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla T4", "T4")]
)
def test_a_card_has_a_short_name(model: str, short: str) -> None:
    assert Device(uuid="GPU-a", index=0, model=model, memory_mib=1, modes=("whole",)).short_model == short
