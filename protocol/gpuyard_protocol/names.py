"""The names of things: tenants, users, services, nodes, jobs, submissions, assignments.

Names become subject tokens, file names and Unix account names, so one grammar serves all: lower-case letters, digits
and hyphens, 1 to 63 characters, starting with a letter or digit. Numbers name jobs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

#: Positive, from one counter of the yard.
JobId: TypeAlias = int
Tenant: TypeAlias = str
User: TypeAlias = str
ServiceName: TypeAlias = str
NodeId: TypeAlias = str
#: A physical GPU's UUID (never its index: indexes move over reboots).
DeviceUuid: TypeAlias = str
SubmissionId: TypeAlias = str

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_SUBMISSION = re.compile(r"[a-z0-9-]{1,64}")
#: What the yard gives to submissions that bring no id of their own: nobody else may take such a name.
_GIVEN_SUBMISSION = re.compile(r"s[0-9]+(-[0-9]+)?")
_ASSIGNMENT = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})\.([0-9]{1,18})")

NAME_EXPECTED = "lower-case letters, digits and hyphens, 1 to 63 characters, starting with a letter or digit"
SUBMISSION_EXPECTED = "lower-case letters, digits and hyphens, 1 to 64 characters, and not of the form s<number>"


def is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text))


def is_submission_id(text: str) -> bool:
    """Whether a tenant may choose this id (those of the form `s17` are the yard's own)."""
    return bool(_SUBMISSION.fullmatch(text)) and not _GIVEN_SUBMISSION.fullmatch(text)


def given_submission_id(sequence: int, index: int | None = None) -> SubmissionId:
    """The id of a submission that brought none: its sequence in SUB, and its place in a message of many."""
    return f"s{sequence}" if index is None else f"s{sequence}-{index}"


class AssignmentKey(NamedTuple):
    """One start of one replica: what a node is told to run, exactly once. Written `17.1.0`."""

    job: JobId
    #: 1 for the first start of the job's processes, one more with each new start.
    attempt: int
    #: 0 … replicas - 1.
    replica: int

    def __str__(self) -> str:
        return f"{self.job}.{self.attempt}.{self.replica}"

    @classmethod
    def parse(cls, text: str) -> AssignmentKey:
        match = _ASSIGNMENT.fullmatch(text)
        if match is None:
            raise ValueError(f"found {text!r}; expected an assignment such as '17.1.0' (job.attempt.replica)")
        return cls(int(match[1]), int(match[2]), int(match[3]))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like this one, or "" when none is."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else ""
