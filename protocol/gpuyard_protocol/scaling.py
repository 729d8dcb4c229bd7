"""How many replicas what runs is to have: an elastic job at most, a service at least and at most; and its rollouts."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from gpuyard_protocol.codec import Malformed, RequestVersion
from gpuyard_protocol.jobs import REPLICAS_MAX
from gpuyard_protocol.names import NAME_EXPECTED, is_name
from gpuyard_protocol.units import Count

RolloutAction: TypeAlias = Literal["restart", "undo"]


class ScaleRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The payload of `sub.<tenant>.<user>.scale`: how many replicas an elastic job, or a service, has from now on."""

    #: Of an elastic job the most that it has; of a service the fewest.
    replicas: int
    #: One of the two.
    job: Count | None = None
    service: str | None = None
    #: Of a service; without it, `replicas` is the most as well.
    max_replicas: int | None = None
    v: RequestVersion = 1
    submission_id: str | None = None

    def check(self) -> None:
        """`Malformed` with the first thing wrong."""
        if (self.job is None) == (self.service is None):
            raise Malformed("$.job", repr(self.job), "a job's number, or a 'service' in its place")
        if self.service is not None and not is_name(self.service):
            raise Malformed("$.service", repr(self.service)[:80], NAME_EXPECTED)
        least = 0 if self.service is not None and self.max_replicas is not None else 1
        if not least <= self.replicas <= REPLICAS_MAX:
            raise Malformed("$.replicas", str(self.replicas), f"a number between {least} and {REPLICAS_MAX}")
        most = self.max_replicas
        if most is not None and self.service is None:
            raise Malformed("$.max_replicas", str(most), "no value for a job, whose fewest its submission has said")
        if most is not None and not max(1, self.replicas) <= most <= REPLICAS_MAX:
            allowed = f"a number between {max(1, self.replicas)} and {REPLICAS_MAX}"
            raise Malformed("$.max_replicas", str(most), allowed)


class RolloutRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The payload of `sub.<tenant>.<user>.rollout`: replace a service's replicas one by one, by new ones of the same
    specification (`restart`) or of the one before it (`undo`)."""

    service: str
    action: RolloutAction = "restart"
    v: RequestVersion = 1
    submission_id: str | None = None
