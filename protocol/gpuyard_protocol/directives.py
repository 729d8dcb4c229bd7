"""What its owner asks of a job that is there: to end, to wait, to start again."""

from __future__ import annotations

import msgspec

from gpuyard_protocol.codec import RequestVersion
from gpuyard_protocol.units import Count


class CancelRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The payload of `sub.<tenant>.<user>.cancel`."""

    job: Count
    #: The whole array that the job belongs to.
    array: bool = False
    v: RequestVersion = 1
    submission_id: str | None = None


class HoldRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The payload of `sub.<tenant>.<user>.hold`, `….release`, `….suspend` and `….resume`."""

    job: Count
    #: Every element of the array that the job belongs to and that this can be done to.
    array: bool = False
    v: RequestVersion = 1
    submission_id: str | None = None


class RequeueRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The payload of `sub.<tenant>.<user>.requeue`: end the attempt with grace, and wait again, uncharged."""

    job: Count
    #: And hold it then.
    hold: bool = False
    #: Every running element of the array that the job belongs to; with `hold`, those that wait are held as well.
    array: bool = False
    v: RequestVersion = 1
    submission_id: str | None = None
