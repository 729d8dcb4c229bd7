"""Card models that can be simulated, as data: name, memory, MIG geometry, NVLink.

The MIG rows are NVIDIA's published geometry. A placement is counted in memory slices; on cards with eight of them a
3g instance takes four, which is why 3g at 0 leaves only three starts for 1g. Memory of an instance is what nvidia-smi
prints, in MiB; a card's own memory is that of its largest instance, so that a whole card never promises more than its
driver grants. Values for B200 are the card's eighths less three in a hundred, not read off a card.

Nothing here decides anything: `simulated` keeps the rules.
"""

from __future__ import annotations

import msgspec

from gpuyard_protocol.resources import MigProfileFacts, Mode

ALL_MODES: tuple[Mode, ...] = ("whole", "mig", "mps", "timeslice")
_WITHOUT_MIG: tuple[Mode, ...] = ("whole", "mps", "timeslice")
#: Before Volta, MPS has neither a limit on compute nor on memory.
_WITHOUT_SHARES: tuple[Mode, ...] = ("whole", "timeslice")

#: Compute slices, memory slices taken, starts, most on one card; of cards with 7 compute and 8 memory slices.
_EIGHTHS: dict[str, tuple[int, int, tuple[int, ...], int]] = {
    "1g": (1, 1, (0, 1, 2, 3, 4, 5, 6), 7),
    "1g+me": (1, 1, (0, 1, 2, 3, 4, 5, 6), 1),
    "1g double": (1, 2, (0, 2, 4, 6), 4),
    "2g": (2, 2, (0, 2, 4), 3),
    "3g": (3, 4, (0, 4), 2),
    "4g": (4, 4, (0,), 1),
    "7g": (7, 8, (0,), 1),
}
#: The same for cards with 4 compute and 4 memory slices.
_QUARTERS: dict[str, tuple[int, int, tuple[int, ...], int]] = {
    "1g": (1, 1, (0, 1, 2, 3), 4),
    "1g+me": (1, 1, (0, 1, 2, 3), 1),
    "2g": (2, 2, (0, 2), 2),
    "2g+me": (2, 2, (0, 2), 1),
    "4g": (4, 4, (0,), 1),
}


class CardModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model of card."""

    #: What a person writes, such as `H100-80GB`.
    name: str
    #: What the driver calls it.
    driver_name: str
    #: Memory that jobs may use.
    memory_mib: int
    modes: tuple[Mode, ...]
    #: Memory slices and compute slices, 0 without MIG.
    mig_slices: int = 0
    mig_compute_slices: int = 0
    mig_profiles: tuple[MigProfileFacts, ...] = ()
    mps_clients_max: int = 48
    #: NVLinks between each two cards of the model on a node; 0: PCIe only.
    nvlinks: int = 0
    #: Power at rest and at full load.
    idle_mw: int = 50_000
    full_mw: int = 300_000


def _profiles(
    table: dict[str, tuple[int, int, tuple[int, ...], int]], sizes: dict[str, tuple[int, int]]
) -> tuple[MigProfileFacts, ...]:
    """`sizes`: per row of the table, the GB in the profile's name, and the memory in MiB."""
    facts = []
    for row, (gigabytes, memory_mib) in sizes.items():
        compute, size, starts, count_max = table[row]
        suffix = "+me" if row.endswith("+me") else ""
        facts.append(
            MigProfileFacts(
                name=f"{compute}g.{gigabytes}gb{suffix}",
                memory_mib=memory_mib,
                size=size,
                starts=starts,
                compute_slices=compute,
                count_max=count_max,
            )
        )
    return tuple(facts)


def _eighths(
    name: str,
    driver_name: str,
    sizes: tuple[tuple[int, int], ...],
    *,
    nvlinks: int,
    idle_mw: int,
    full_mw: int,
) -> CardModel:
    """`sizes`: (GB in the name, MiB) for 1g, double 1g and 2g, 3g and 4g, 7g."""
    one, two, half, full = sizes
    return CardModel(
        name=name,
        driver_name=driver_name,
        memory_mib=full[1],
        modes=ALL_MODES,
        mig_slices=8,
        mig_compute_slices=7,
        mig_profiles=_profiles(
            _EIGHTHS, {"1g": one, "1g+me": one, "1g double": two, "2g": two, "3g": half, "4g": half, "7g": full}
        ),
        nvlinks=nvlinks,
        idle_mw=idle_mw,
        full_mw=full_mw,
    )


def _plain(
    name: str,
    driver_name: str,
    memory_mib: int,
    *,
    full_mw: int,
    nvlinks: int = 0,
    modes: tuple[Mode, ...] = _WITHOUT_MIG,
) -> CardModel:
    return CardModel(
        name=name,
        driver_name=driver_name,
        memory_mib=memory_mib,
        modes=modes,
        nvlinks=nvlinks,
        idle_mw=full_mw // 8,
        full_mw=full_mw,
    )


_ALL = (
    _eighths(
        "A100-40GB",
        "NVIDIA A100-SXM4-40GB",
        ((5, 4864), (10, 9984), (20, 19_968), (40, 40_192)),
        nvlinks=12,
        idle_mw=55_000,
        full_mw=400_000,
    ),
    _eighths(
        "A100-80GB",
        "NVIDIA A100-SXM4-80GB",
        ((10, 9728), (20, 19_968), (40, 40_192), (80, 80_896)),
        nvlinks=12,
        idle_mw=60_000,
        full_mw=400_000,
    ),
    _eighths(
        "H100-80GB",
        "NVIDIA H100 80GB HBM3",
        ((10, 9984), (20, 20_096), (40, 40_448), (80, 81_152)),
        nvlinks=18,
        idle_mw=70_000,
        full_mw=700_000,
    ),
    _eighths(
        "H100-94GB",
        "NVIDIA H100 NVL",
        ((12, 11_008), (24, 22_144), (47, 47_232), (94, 94_848)),
        nvlinks=0,
        idle_mw=65_000,
        full_mw=400_000,
    ),
    _eighths(
        "H200-141GB",
        "NVIDIA H200",
        ((18, 16_384), (35, 33_280), (71, 71_424), (141, 143_360)),
        nvlinks=18,
        idle_mw=75_000,
        full_mw=700_000,
    ),
    _eighths(
        "B200-180GB",
        "NVIDIA B200",
        ((23, 22_272), (45, 44_544), (90, 89_088), (180, 178_816)),
        nvlinks=18,
        idle_mw=140_000,
        full_mw=1_000_000,
    ),
    CardModel(
        name="A30-24GB",
        driver_name="NVIDIA A30",
        memory_mib=24_000,
        modes=ALL_MODES,
        mig_slices=4,
        mig_compute_slices=4,
        mig_profiles=_profiles(
            _QUARTERS,
            {"1g": (6, 5952), "1g+me": (6, 5952), "2g": (12, 11_968), "2g+me": (12, 11_968), "4g": (24, 24_000)},
        ),
        idle_mw=30_000,
        full_mw=165_000,
    ),
    _plain("A10-24GB", "NVIDIA A10", 22_528, full_mw=150_000),
    _plain("L4-24GB", "NVIDIA L4", 22_528, full_mw=72_000),
    _plain("L40S-48GB", "NVIDIA L40S", 45_568, full_mw=350_000),
    _plain("P100-16GB", "Tesla P100-PCIE-16GB", 16_128, full_mw=250_000, modes=_WITHOUT_SHARES),
    _plain("T4-16GB", "Tesla T4", 14_912, full_mw=70_000),
    _plain("V100-16GB", "Tesla V100-SXM2-16GB", 16_128, full_mw=300_000, nvlinks=6),
    _plain("V100-32GB", "Tesla V100-SXM2-32GB", 32_256, full_mw=300_000, nvlinks=6),
)

#: By the name people write, in lower case.
CARD_MODELS: dict[str, CardModel] = {model.name.lower(): model for model in _ALL}


def find_model(text: str) -> CardModel:
    """The model called so; its memory may be left out where only one size exists. `ValueError` names those allowed."""
    wanted = text.strip().lower()
    if wanted in CARD_MODELS:
        return CARD_MODELS[wanted]
    of_family = [model for name, model in CARD_MODELS.items() if name.split("-")[0] == wanted]
    if len(of_family) == 1:
        return of_family[0]
    allowed = ", ".join(model.name for model in (of_family or _ALL))
    problem = "comes in several sizes" if of_family else "is no card model that can be simulated"
    raise ValueError(f"{text.strip()!r} {problem}; expected one of {allowed}")
