"""Which orders are taken, and in what order.

Orders carry dense numbers per node, the leader's epoch and the agent's instance. A message is taken as a whole or not
at all, and a refusal changes nothing, not even the epoch:

- for another node or an earlier process of this agent: `wrong-instance`
- from an older leader, or a `Sync` older than what was taken: `stale`
- with a number missing before it: `gap`; the daemon answers with a `Sync`

What is repeated is skipped and answered `ok`: numbers are given once, so an order at or below `applied` is one that was
taken. A `Sync` at number n stands for all orders up to n: it states the whole desired set, and what is not in it must
not run. Two at the same number are told apart by their serials: a late copy of an older one would start again what
ended, was reported and forgotten since.
"""

from __future__ import annotations

from gpuyard_agent.core import leases, life, suspension
from gpuyard_agent.core.actions import Answer
from gpuyard_agent.core.book import Book
from gpuyard_agent.core.events import OrdersReceived, RenewalReceived, SyncReceived
from gpuyard_agent.core.model import Verdict
from gpuyard_protocol.nodes import (
    Desired,
    Go,
    Order,
    OrderAnswer,
    OrderBatch,
    Renew,
    Resume,
    Start,
    Stop,
    Suspend,
    Sync,
)


def take_orders(book: Book, event: OrdersReceived) -> None:
    batch = event.batch
    refusal = _refuse(book, batch)
    if refusal is None:
        leases.renew(book, batch.clock_ms)
    if refusal is None and batch.first > book.counters.applied + 1:
        detail = f"orders from {batch.first} on, while {book.counters.applied + 1} is next"
        refusal = OrderAnswer(status="gap", applied=book.counters.applied, detail=detail)
    if refusal is not None:
        book.act(Answer(event.request, refusal))
        return
    fresh = batch.orders[book.counters.applied + 1 - batch.first :]
    for order in fresh:
        _take(book, order)
    _taken(book, event.request, batch.epoch, max(book.counters.applied, batch.first + len(batch.orders) - 1))


def take_sync(book: Book, event: SyncReceived) -> None:
    sync = event.sync
    refusal = _refuse(book, sync)
    if refusal is None:
        leases.renew(book, sync.clock_ms)
    if refusal is None and sync.n < book.counters.applied:
        detail = f"a sync at {sync.n}, while orders up to {book.counters.applied} were taken"
        refusal = OrderAnswer(status="stale", applied=book.counters.applied, detail=detail)
    name, newest = (sync.epoch, sync.serial), book.newest_sync
    if refusal is None and sync.serial and name < newest:
        detail = f"sync {sync.serial} of epoch {sync.epoch}, while {newest[1]} of {newest[0]} was taken"
        refusal = OrderAnswer(status="stale", applied=book.counters.applied, detail=detail)
    if refusal is None and sync.serial and name == newest:
        refusal = OrderAnswer(status="ok", applied=book.counters.applied)  # repeated: taken already
    if refusal is not None:
        book.act(Answer(event.request, refusal))
        return
    book.newest_sync = max(name, newest)
    wanted = {entry.start.key for entry in sync.desired}
    for assignment in [entry for key, entry in book.live.items() if key not in wanted]:
        verdict = Verdict(outcome="stopped", detail="superseded")
        life.stop(book, assignment, verdict, assignment.start.launch.stop_grace_ms)
    for entry in sync.desired:
        _want(book, entry)
    book.prune([key for key, entry in book.closed.items() if entry.delivered_ms is not None and key not in wanted])
    _taken(book, event.request, sync.epoch, sync.n)


def take_renewal(book: Book, event: RenewalReceived) -> None:
    """No order: it has no number, and changes nothing but the leases."""
    answer = _refuse(book, event.renew)
    if answer is None:
        leases.renew(book, event.renew.clock_ms)
        answer = OrderAnswer(status="ok", applied=book.counters.applied)
    book.act(Answer(event.request, answer))


def _refuse(book: Book, message: OrderBatch | Sync | Renew) -> OrderAnswer | None:
    applied = book.counters.applied
    if message.node != book.node or message.instance != book.instance:
        detail = f"this is {book.node}, instance {book.instance}"
        return OrderAnswer(status="wrong-instance", applied=applied, detail=detail)
    if message.epoch < book.counters.epoch:
        detail = f"epoch {message.epoch}, while {book.counters.epoch} leads"
        return OrderAnswer(status="stale", applied=applied, detail=detail)
    return None


def _taken(book: Book, request: int, epoch: int, applied: int) -> None:
    if (epoch, applied) != (book.counters.epoch, book.counters.applied):
        book.counters.epoch, book.counters.applied = epoch, applied
        book.turn.orders_taken = True
    book.prune_old()
    book.act(Answer(request, OrderAnswer(status="ok", applied=applied)))


def _take(book: Book, order: Order) -> None:
    if order.key in book.closed:  # ended, or stopped before it came: the report of that stands
        return
    match order:
        case Start(key=key):
            if key not in book.live:
                life.begin(book, order)
        case Go(key=key):
            if (assignment := book.live.get(key)) is not None:
                life.let_go(book, assignment, order)
        case Suspend(key=key) | Resume(key=key):
            if (assignment := book.live.get(key)) is not None:
                suspension.take(book, assignment, order)
        case Stop(key=key, grace_ms=grace_ms, reason=reason):
            if (assignment := book.live.get(key)) is None:
                life.tombstone(book, order)
            else:
                life.stop(book, assignment, Verdict(outcome="stopped", detail=reason), grace_ms)


def _want(book: Book, entry: Desired) -> None:
    key = entry.start.key
    if key in book.closed:
        return
    assignment = book.live.get(key)
    if assignment is None:
        if entry.stop is not None:
            life.tombstone(book, entry.stop)
        else:
            assignment = life.begin(book, entry.start, entry.go)
            if entry.standing is not None:
                suspension.take(book, assignment, entry.standing)
        return
    if entry.go is not None:
        life.let_go(book, assignment, entry.go)
    if entry.standing is not None and entry.stop is None:
        suspension.take(book, assignment, entry.standing)
    if entry.stop is not None:
        verdict = Verdict(outcome="stopped", detail=entry.stop.reason)
        life.stop(book, assignment, verdict, entry.stop.grace_ms)
