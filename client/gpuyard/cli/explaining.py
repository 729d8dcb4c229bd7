"""`gpuyard why` and `gpuyard submit --dry-run` in words: lines for people, made from the yard's answer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gpuyard.cli.options import flag_of
from gpuyard.cli.output import rough
from gpuyard_protocol.explaining import Holder, KeyTerm, Remedy
from gpuyard_protocol.jobs import ENDED_AS
from gpuyard_protocol.queries import DryRun, NodeReason, WhyAnswer
from gpuyard_protocol.units import format_milli

_BASES = {
    "limit": "by its time limit",
    "estimate": "as its owner estimates",
    "history": "as jobs like it took",
    "stopping": "it was told to end",
}
_VERDICTS = {"starts": "", "waits": "it would wait: ", "rejected": "it would be rejected: "}
#: Terms with these values change nothing.
_NOTHING = {"+0", "0", "no"}


def why_lines(answer: WhyAnswer, now_ms: int) -> Iterator[str]:
    """The whole answer; the first line stands for itself."""
    yield f"job {answer.job} {_state(answer)}"
    yield from waiting_lines(answer, now_ms)
    if answer.story:
        yield "what happened:"
        yield from (f"  {line}" for line in answer.story)


def _state(answer: WhyAnswer) -> str:
    """`is pending: held by alice`, `is running on node-2`, `has failed: …`; what repeats the state is left out."""
    said = ENDED_AS.get(answer.state, f"is {answer.state}")
    rest = answer.summary.removeprefix(f"{answer.state}: ")
    if rest == answer.state:
        return said
    if rest.startswith(f"{answer.state} "):
        return said + rest.removeprefix(answer.state)
    return f"{said}: {rest}"


def waiting_lines(answer: WhyAnswer, now_ms: int) -> Iterator[str]:
    """What is said of a job that waits, without its history."""
    if answer.position:
        yield f"  number {answer.position} of those waiting, {answer.ahead} ahead of it"
    if answer.estimate is not None:
        yield f"when: {answer.estimate.text}"
    if answer.reasons or answer.cards:
        yield "what stands in the way:" if not answer.limit else "what the nodes say:"
        yield from (f"  {_reason(reason)}" for reason in answer.reasons)
        if answer.cards:
            cards = "; ".join(f"{count.cards} {count.reason.text}" for count in answer.cards)
            yield f"  of the cards: {cards}"
    if answer.holders:
        yield "who holds what it could use:"
        yield from (f"  {_holder(holder, now_ms)}" for holder in answer.holders)
    if answer.remedies:
        yield "what would start it now:"
        yield from (f"  {_remedy(remedy)}" for remedy in answer.remedies)
    yield from _terms(answer.terms)


def _reason(reason: NodeReason) -> str:
    nodes = "1 node" if reason.nodes == 1 else f"{reason.nodes} nodes"
    more = ", …" if reason.nodes > len(reason.examples) else ""
    examples = f" ({', '.join(reason.examples)}{more})" if reason.examples else ""
    return f"{nodes}: {reason.reason.text}{examples}"


def _holder(holder: Holder, now_ms: int) -> str:
    if holder.job:
        name = f" ({holder.name})" if holder.name else ""
        who = f"job {holder.job}{name} of {holder.tenant}/{holder.user}"
    else:
        jobs = "1 job" if holder.jobs == 1 else f"{holder.jobs} jobs"
        who = f"{jobs} of {holder.tenant or 'other tenants'}"
    amount = f"{format_milli(holder.held_milli)} GPU{'' if holder.held_milli == 1000 else 's'} on "
    nodes = ", ".join(holder.examples) if holder.nodes <= len(holder.examples) else f"{holder.nodes} nodes"
    if not holder.until_ms:
        until = "nobody knows until when"
    else:
        first = "the first ends" if holder.jobs > 1 else "ends"
        until = f"{first} in {rough(max(0, holder.until_ms - now_ms))}, {_BASES.get(holder.basis, holder.basis)}"
    return f"{who}: {amount if holder.held_milli else 'CPU or memory on '}{nodes}; {until}"


def _remedy(remedy: Remedy) -> str:
    where = f" → {', '.join(remedy.nodes)}" if remedy.nodes and remedy.kind != "EndOf" else ""
    flags = " ".join(_flag(name, value) for name, value in remedy.fields.items())
    return remedy.text + where + (f"   [{flags}]" if flags else "")


def _flag(field: str, value: str | int | None) -> str:
    return f"no {flag_of(field)}" if value is None else f"{flag_of(field)} {value}"


def _terms(terms: tuple[KeyTerm, ...]) -> Iterator[str]:
    """Level and band on the first line; then what adds to the level, and what else there is to know."""
    named = {term.name: term for term in terms}
    band, level = named.get("band"), named.get("level")
    if level is not None:
        among = f" in band {band.value}" + (f" ({band.text})" if band.text else "") if band else ""
        yield f"its place in line: level {level.value}{among}; {level.text}"
    for term in terms:
        if term.name in ("band", "level", "size_gpu_ms") or (term.name != "natural" and term.value in _NOTHING):
            continue
        is_told = term.value == "yes" or term.name.endswith("_gpu_ms")
        yield f"  {term.text}" if is_told else f"  {term.value}  {term.text}"


def dry_run_lines(answer: DryRun, now_ms: int, named: Callable[[str], str] = str) -> Iterator[str]:
    """What would become of a job; `named` says how whoever asks calls the place that a path names."""
    path = answer.refusal.path if answer.refusal is not None else ""
    is_placed = bool(path) and answer.summary.startswith(path)
    yield _VERDICTS[answer.verdict] + (named(path) + answer.summary.removeprefix(path) if is_placed else answer.summary)
    if answer.elements:
        yield f"  (an array of {answer.elements} jobs; this is about the first)"
    for replica in answer.placed:
        devices = f" on {', '.join(replica.devices)}" if replica.devices else ""
        yield f"  replica {replica.replica}: {replica.node}, {replica.partition}{devices}"
    if answer.refusal is not None and path and not is_placed:
        near = f"; nearest: {answer.refusal.nearest}" if answer.refusal.nearest else ""
        yield f"  {named(path)}: found {answer.refusal.found}; expected {answer.refusal.expected}{near}"
    if answer.why is not None:
        yield from waiting_lines(answer.why, now_ms)
