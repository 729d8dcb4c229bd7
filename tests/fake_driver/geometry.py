"""Turns `geometry.toml` into the C tables that the fake driver is built with, and into facts that tests check against.

The one reader of the table: it resolves layouts into profiles, names them as the driver does, and refuses rows that
contradict their layout, so that a slip in the data stops the build.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("geometry.toml")

_ARCHITECTURES = {"volta": 5, "turing": 6, "ampere": 7, "ada": 8, "hopper": 9, "blackwell": 10}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """One GPU-instance profile of one model."""

    #: As the driver names it, without its leading "MIG ": `1g.10gb+me`.
    name: str
    #: What ProfileInfo is asked by, and what Create takes.
    enumerator: int
    id: int
    #: Compute slices, memory slices taken, and where the latter may begin.
    compute: int
    size: int
    starts: tuple[int, ...]
    #: Most of them at once on one card.
    most: int
    media: bool
    memory_mib: int
    multiprocessors: int
    #: Copy, decode, JPEG, OFA.
    engines: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One model of card."""

    #: What tests write, such as `H100-80GB`.
    name: str
    #: What the driver calls it.
    driver_name: str
    architecture: int
    capability: tuple[int, int]
    pci_device_id: int
    #: All of its memory, and what the driver leaves to jobs.
    total_mib: int
    usable_mib: int
    multiprocessors: int
    slice_multiprocessors: int
    links: int
    idle_mw: int
    full_mw: int
    #: 0 without MIG.
    memory_slices: int
    compute_slices: int
    #: "never", "by reset" or "at once": how its MIG mode is switched.
    mig: str
    profiles: tuple[Profile, ...]

    def profile(self, name: str) -> Profile:
        """The profile called so; `KeyError` if the model has none."""
        for profile in self.profiles:
            if profile.name == name:
                return profile
        raise KeyError(name)


@functools.cache
def models() -> dict[str, Model]:
    """Every model of the table, by name."""
    table = tomllib.loads(TABLE.read_text())
    return {name: _model(name, row, table["layouts"]) for name, row in table["models"].items()}


def _model(name: str, row: dict[str, Any], layouts: dict[str, Any]) -> Model:
    without: dict[str, Any] = {"memory_slices": 0, "compute_slices": 0, "rows": {}}
    layout: dict[str, Any] = layouts[row["layout"]] if "layout" in row else without
    rows = row.get("profiles", {})
    if set(rows) != set(layout["rows"]):
        raise ValueError(f"{name}: profiles {sorted(rows)} are not those of its layout, {sorted(layout['rows'])}")
    architecture = _ARCHITECTURES[row["architecture"]]
    return Model(
        name=name,
        driver_name=row["driver_name"],
        architecture=architecture,
        capability=(row["capability"][0], row["capability"][1]),
        pci_device_id=row["pci_device_id"],
        total_mib=row["total_mib"],
        usable_mib=row["usable_mib"],
        multiprocessors=row["multiprocessors"],
        slice_multiprocessors=row.get("slice_multiprocessors", 0),
        links=row["links"],
        idle_mw=row["power_mw"][0],
        full_mw=row["power_mw"][1],
        memory_slices=layout["memory_slices"],
        compute_slices=layout["compute_slices"],
        mig="never" if not rows else "at once" if architecture >= _ARCHITECTURES["hopper"] else "by reset",
        profiles=tuple(_profile(name, shape, layout, rows[shape]) for shape in layout["rows"]),
    )


def _profile(model: str, shape: str, layout: dict[str, Any], row: dict[str, Any]) -> Profile:
    place = layout["rows"][shape]
    if any(start + place["size"] > layout["memory_slices"] for start in place["starts"]):
        raise ValueError(f"{model} {shape}: a start reaches beyond {layout['memory_slices']} memory slices")
    copy, decode, jpeg, ofa = row["engines"]
    return Profile(
        name=f"{place['compute']}g.{row['gb']}gb" + ("+me" if place.get("media") else ""),
        enumerator=place["enumerator"],
        id=place["id"],
        compute=place["compute"],
        size=place["size"],
        starts=tuple(place["starts"]),
        most=place["most"],
        media=place.get("media", False),
        memory_mib=row["memory_mib"],
        multiprocessors=row["multiprocessors"],
        engines=(copy, decode, jpeg, ofa),
    )


def render() -> str:
    """The C source of the tables declared in nvml/models.h."""
    rules = {"never": "MIG_NEVER", "by reset": "MIG_BY_RESET", "at once": "MIG_AT_ONCE"}
    tables, rows = [], []
    for number, model in enumerate(models().values()):
        profiles = "".join(_c_profile(profile) for profile in model.profiles)
        if profiles:
            tables.append(f"static const struct gi_profile profiles_{number}[] = {{\n{profiles}}};\n")
        rows.append(
            f'    {{.name = "{model.name}", .driver_name = "{model.driver_name}",\n'
            f"     .architecture = {model.architecture},\n"
            f"     .capability_major = {model.capability[0]}, .capability_minor = {model.capability[1]},\n"
            f"     .total_mib = {model.total_mib}, .reserved_mib = {model.total_mib - model.usable_mib},\n"
            f"     .memory_slices = {model.memory_slices}, .compute_slices = {model.compute_slices},\n"
            f"     .multiprocessors = {model.multiprocessors},"
            f" .multiprocessors_per_slice = {model.slice_multiprocessors},\n"
            f"     .mig = {rules[model.mig]}, .performance_monitoring = {int(model.architecture >= 9)},\n"
            f"     .links = {model.links}, .pci_device_id = {model.pci_device_id:#x},\n"
            f"     .idle_mw = {model.idle_mw}, .full_mw = {model.full_mw},\n"
            f"     .profiles = {f'profiles_{number}' if profiles else '0'}, .profile_count = {len(model.profiles)}}},\n"
        )
    return (
        '#include "models.h"\n\n'
        + "\n".join(tables)
        + "\nconst struct gpu_model fake_models[] = {\n"
        + "".join(rows)
        + f"}};\nconst unsigned fake_model_count = {len(rows)};\n"
    )


def _c_profile(profile: Profile) -> str:
    copy, decode, jpeg, ofa = profile.engines
    starts = ", ".join(str(start) for start in profile.starts)
    return (
        f'    {{.name = "{profile.name}", .enumerator = {profile.enumerator}, .id = {profile.id},'
        f" .compute = {profile.compute}, .size = {profile.size}, .starts = {{{starts}}},\n"
        f"     .start_count = {len(profile.starts)}, .most = {profile.most}, .media = {int(profile.media)},"
        f" .multiprocessors = {profile.multiprocessors}, .copy_engines = {copy}, .decoders = {decode},"
        f" .jpegs = {jpeg}, .ofas = {ofa}, .memory_mib = {profile.memory_mib}}},\n"
    )
