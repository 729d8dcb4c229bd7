"""How asking a yard can fail, for the SDK's callers and for the CLI, which prints each as one line.

Every error of this package is a `GpuyardError`, and its text says what to do next where there is something to do. A
`Rejected` is the yard's own answer to a request: understood, decided, refused. All the others mean that no answer came.
"""

from __future__ import annotations

from gpuyard_protocol.codec import Malformed
from gpuyard_protocol.jobs import SubmissionAnswer


class GpuyardError(Exception):
    """Something asked of a yard did not come about."""


class NoYard(GpuyardError):
    """Nothing says which yard is meant, or what says so cannot be read."""


class Unreachable(GpuyardError):
    """The yard's message server or its daemon does not answer; nothing happened."""


class Full(Unreachable):
    """The yard has no room for more requests now; nothing was stored, and later there may be."""

    def __init__(self, text: str, why: str = "") -> None:
        super().__init__(text)
        self.why = why or text


class Forbidden(GpuyardError):
    """The server refused this key."""


class OutcomeUnknown(GpuyardError):
    """A request may have been taken in, but the word that it was did not come back."""


class NoRoom(OutcomeUnknown):
    """The yard ran out of room while a request was under way: very likely it is not stored, but nobody is certain."""


class Undecided(GpuyardError):
    """The request is durable, but no decision was heard in time; it will still be decided."""

    def __init__(self, submission_id: str, waited_s: float) -> None:
        super().__init__(
            f"request {submission_id} is stored, but the daemon did not decide on it within {waited_s:g} s; "
            "it will when it runs again (look with: gpuyard jobs)"
        )
        self.submission_id = submission_id


class QueryFailed(GpuyardError):
    """The daemon answered a question with an error: `code` for programs, and the nearest name that exists."""

    def __init__(self, code: str, text: str, nearest: str = "") -> None:
        super().__init__(text + _hint(nearest, text))
        self.code = code
        self.text = text
        self.nearest = nearest


class Rejected(GpuyardError):
    """The yard refuses a request. `reason` is a code; the other fields say what exactly was wrong, "" where unknown."""

    def __init__(
        self,
        reason: str,
        text: str = "",
        *,
        path: str = "",
        found: str = "",
        expected: str = "",
        nearest: str = "",
        submission_id: str = "",
        retry_after_ms: int = 0,
    ) -> None:
        if not text and path:
            text = f"{path}: found {found}; expected {expected}"
        text = text or reason
        super().__init__(text + _hint(nearest, text))
        self.reason = reason
        self.text = text
        self.path = path
        self.found = found
        self.expected = expected
        self.nearest = nearest
        #: "" where the request never left this process.
        self.submission_id = submission_id
        #: How long to wait before sending it again; 0: nothing is known.
        self.retry_after_ms = retry_after_ms

    @classmethod
    def from_answer(cls, answer: SubmissionAnswer) -> Rejected:
        return cls(
            answer.reason.code if answer.reason else "Rejected",
            answer.reason.text if answer.reason else "",
            path=answer.path,
            found=answer.found,
            expected=answer.expected,
            nearest=answer.nearest,
            submission_id=answer.submission_id,
            retry_after_ms=answer.retry_after_ms,
        )

    @classmethod
    def from_malformed(cls, error: Malformed) -> Rejected:
        return cls("Malformed", path=error.path, found=error.found, expected=error.expected, nearest=error.nearest)


def _hint(nearest: str, text: str) -> str:
    """The nearest that exists, unless the text names it already; among all that are allowed it would be overlooked."""
    is_named = nearest in text and "one of: " not in text
    return f" (did you mean {nearest!r}?)" if nearest and not is_named and "did you mean" not in text else ""
