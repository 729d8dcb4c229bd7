"""Why a job waits, in full: what stands in the way, who holds it, what would start the job, and when it may start.

Parts of `WhyAnswer`, and so of the answer to a dry run. A tenant is told everything about its own jobs, and of those of
others only how much they hold: no numbers, names or users.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from gpuyard_protocol.jobs import Why

#: What an expected end rests on. `stopping`: it was told to end. `limit`: its time limit. `estimate`: what its owner
#: said. `history`: how long jobs like it took. "": nothing is known.
EndBasis: TypeAlias = Literal["", "stopping", "limit", "estimate", "history"]
#: What an estimated start rests on, the weakest of all that it used. `now`: there is room. `begin`: the time that it
#: was given. `rate`: how fast jobs ended lately. `none`: there is nothing to go by.
StartBasis: TypeAlias = Literal["now", "begin", "stopping", "limit", "estimate", "history", "lent", "rate", "none"]


class CardReason(msgspec.Struct, frozen=True, kw_only=True):
    """What so many cards say to the job."""

    reason: Why
    cards: int


class Holder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who holds cards, CPUs or memory that the job could use."""

    #: The job's number; 0: several jobs together, those of other tenants or too many to list.
    job: int = 0
    #: How many jobs this row stands for.
    jobs: int = 1
    #: "": other tenants than the asker's.
    tenant: str = ""
    user: str = ""
    name: str = ""
    #: GPU compute held on cards that the job could use, in thousandths of a card.
    held_milli: int = 0
    #: On so many nodes, and some of their names.
    nodes: int = 0
    examples: tuple[str, ...] = ()
    #: When it is expected to end (of several: the first of them), Unix milliseconds; 0: not known.
    until_ms: int = 0
    basis: EndBasis = ""


class KeyTerm(msgspec.Struct, frozen=True):
    """One term of a job's place in line."""

    name: str
    value: str
    #: What it is, in words.
    text: str


class Remedy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One change after which the job would start now."""

    #: `DropNodes`, `DropLabels`, `OtherModel`, `WeakerIsolation`, `LessCpu`, `LessMemory`, `OtherSplit`, `FewerGpus`,
    #: `FewerReplicas`, `SmallerShare`, `LessGpuMemory`, `SmallerProfile`, `ShareInstead`, `EndOf`, `RaiseQuota`.
    kind: str
    #: One sentence.
    text: str
    #: The request's fields as they would have to be; null: without the field.
    fields: dict[str, str | int | None] = {}
    #: Where it would start.
    nodes: tuple[str, ...] = ()
    #: Whose it is to make.
    by: Literal["owner", "operator", "others"] = "owner"
    #: Jobs that would have to end, the asker's own only.
    jobs: tuple[int, ...] = ()


class StartEstimate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When the job may start, and what that rests on."""

    basis: StartBasis
    #: One sentence.
    text: str
    #: Unix milliseconds; 0: there is nothing to go by.
    at_ms: int = 0
