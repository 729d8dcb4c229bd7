"""What the operator grants each tenant, as data.

A policy comes from the daemon's configuration and enters the core as an input, so that the journal says which limits a
decision rested on and a standby decides as the leader would. It decides nothing itself; `tenancy` holds usage against
it.
"""

from __future__ import annotations

import msgspec

from gpuyard_protocol.names import Tenant


class TenantLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """The limits of one tenant; 0 is no limit."""

    #: GPU compute held at once, in thousandths of a card. Soft: what is beyond it waits.
    gpus_max_milli: int = 0
    #: Jobs that have not ended, replicas of services included. Hard: submissions beyond it are rejected.
    jobs_max: int = 0


NO_LIMITS = TenantLimits()


class Policy(msgspec.Struct, frozen=True, omit_defaults=True):
    """Limits by tenant. A core that was never told one limits nobody."""

    #: Of every tenant that is not named.
    default: TenantLimits = NO_LIMITS
    #: Of those that are, sorted by name.
    tenants: tuple[tuple[Tenant, TenantLimits], ...] = ()
