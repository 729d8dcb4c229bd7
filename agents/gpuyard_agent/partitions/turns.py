"""Who has a time-sliced card, and until when: turns by weight, decided and nothing else.

Pure: no clock, no processes. A *party* is what runs together: the replicas of one job on this node, on one card or
several, since a member of a gang that waits for a halted one only burns its card. At any time at most one party has
a card; a party needs all of its cards at once.

- The next turn goes to the party that has had least of its due (time had ÷ weight). Who comes, or comes back, starts
  level with the others: time that nobody else wanted is nobody's debt.
- A turn's length is by weight too: a round of `quantum × parties` is divided among them. So weights hold within each
  round, and what rounding and short turns leave over evens out in the next.
- Nothing waits while a card is free. A party that does nothing in its turn gives it away and *rests*: it is not halted,
  so that it can wake up, and takes its place among the others as soon as it works.
- A party of several cards is not starved by the turns of each: whoever gets one of its cards meanwhile has it only
  until the others are free.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec

from gpuyard_protocol.names import AssignmentKey, DeviceUuid

#: A job's attempt.
Party: TypeAlias = tuple[int, int]
State: TypeAlias = Literal["waits", "has-turn", "rests"]

#: Units of `had` for a millisecond at weight 1: fine enough that many small settlements lose nothing.
_SCALE = 1_000_000


class TurnSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in milliseconds."""

    #: Mean length of a turn. Below a second, work that is queued on the card outlives the turn that queued it.
    quantum_ms: int = 5_000
    #: No turn is shorter, whatever the weight.
    shortest_ms: int = 1_000
    #: A party that does nothing for so long in its turn rests; 0: never.
    idle_ms: int = 2_000


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Who may run now: all others of a time-sliced card are to be halted, before these are let go."""

    running: frozenset[Party]
    #: When to ask again if nothing happens; None: never.
    next_ms: int | None


class _Contender(msgspec.Struct, kw_only=True):
    """One party."""

    party: Party
    #: Weight on each of its cards, by replica.
    places: dict[AssignmentKey, tuple[DeviceUuid, int]]
    #: In the order of joining.
    number: int
    state: State = "waits"
    #: Time had ÷ weight, in units that only compare.
    had: int = 0
    #: Since when `had` is not yet settled, while it has the turn.
    since_ms: int = 0
    #: End of its turn; None while nobody else wants its cards.
    until_ms: int | None = None
    #: When it last lost its turn: of equals, who waited longest goes first.
    off_ms: int = 0
    #: Since when it has done nothing; None: it works, or nobody looked.
    idle_since_ms: int | None = None

    @property
    def cards(self) -> frozenset[DeviceUuid]:
        return frozenset(card for card, _ in self.places.values())

    @property
    def weight(self) -> int:
        """Of its weakest place; a party runs as a whole."""
        return max(1, min(weight for _, weight in self.places.values()))


class Turns:
    """The parties on the time-sliced cards of one node."""

    def __init__(self, settings: TurnSettings) -> None:
        self._settings = settings
        self._contenders: dict[Party, _Contender] = {}
        self._joined = 0

    # --- what happens ---

    def join(self, key: AssignmentKey, card: DeviceUuid, weight: int, now_ms: int) -> None:
        """A replica runs on this card. The first of its job makes the party."""
        party = party_of(key)
        contender = self._contenders.get(party)
        if contender is None:
            self._joined += 1
            contender = _Contender(
                party=party, places={key: (card, weight)}, number=self._joined, since_ms=now_ms, off_ms=now_ms
            )
            self._contenders[party] = contender
            self._level(contender, now_ms)
        else:
            self._settle(contender, now_ms)
            contender.places[key] = (card, weight)
            if contender.state == "has-turn":
                self._end_turn(contender, now_ms)  # its new card may be somebody else's now

    def leave(self, key: AssignmentKey, now_ms: int) -> None:
        """The replica has ended, or is being stopped: it is not halted any more."""
        contender = self._contenders.get(party_of(key))
        if contender is None or key not in contender.places:
            return
        self._settle(contender, now_ms)
        del contender.places[key]
        if not contender.places:
            del self._contenders[contender.party]

    def note(self, party: Party, now_ms: int, *, works: bool) -> None:
        """What a party that is not halted was seen doing."""
        contender = self._contenders.get(party)
        if contender is None or contender.state == "waits":
            return
        if not works:
            contender.idle_since_ms = now_ms if contender.idle_since_ms is None else contender.idle_since_ms
            return
        contender.idle_since_ms = None
        if contender.state == "rests":
            contender.state = "waits"
            contender.off_ms = now_ms
            self._level(contender, now_ms)

    # --- reading ---

    @property
    def is_contended(self) -> bool:
        """Some card is wanted by two parties or more: only then is anybody halted, or worth watching."""
        seen: set[DeviceUuid] = set()
        for contender in self._contenders.values():
            if seen & contender.cards:
                return True
            seen |= contender.cards
        return False

    def members(self, party: Party) -> tuple[AssignmentKey, ...]:
        contender = self._contenders.get(party)
        return tuple(sorted(contender.places)) if contender is not None else ()

    def parties(self) -> tuple[Party, ...]:
        return tuple(self._contenders)

    # --- deciding ---

    def decide(self, now_ms: int) -> Decision:
        """Who runs from now on. Asked again at the same time, it answers the same."""
        for contender in self._contenders.values():
            self._settle(contender, now_ms)
            self._rest_if_idle(contender, now_ms)
            if contender.state == "has-turn" and self._is_over(contender, now_ms):
                self._end_turn(contender, now_ms)
        taken = {card: one for one in self._in_state("has-turn") for card in one.cards}
        #: For cards that a party waits for whose other cards are taken: when those are free.
        wanted_at: dict[DeviceUuid, int] = {}
        waiting = sorted(self._in_state("waits"), key=lambda one: (one.had, one.off_ms, one.number))
        for contender in waiting:
            holders = {taken[card].party: taken[card] for card in contender.cards if card in taken}
            if holders:
                ends = [one.until_ms for one in holders.values() if one.until_ms is not None]
                for card in contender.cards - taken.keys():
                    wanted_at.setdefault(card, max(ends, default=now_ms))
                continue
            self._begin_turn(contender, now_ms, wanted_at)
            taken |= dict.fromkeys(contender.cards, contender)
        return self._decision()

    def _decision(self) -> Decision:
        running = frozenset(one.party for one in self._contenders.values() if one.state != "waits")
        deadlines = [one.until_ms for one in self._in_state("has-turn") if one.until_ms is not None]
        if self._settings.idle_ms:
            deadlines += [
                one.idle_since_ms + self._settings.idle_ms
                for one in self._in_state("has-turn")
                if one.idle_since_ms is not None and self._rivals(one)
            ]
        return Decision(running=running, next_ms=min(deadlines, default=None))

    def _in_state(self, state: State) -> list[_Contender]:
        return [one for one in self._contenders.values() if one.state == state]

    def _rivals(self, contender: _Contender) -> list[_Contender]:
        """Others that want one of its cards; who rests wants nothing."""
        return [
            one
            for one in self._contenders.values()
            if one is not contender and one.state != "rests" and one.cards & contender.cards
        ]

    def _is_over(self, contender: _Contender, now_ms: int) -> bool:
        rivals = self._rivals(contender)
        if not rivals:
            contender.until_ms = None
            return False
        # Alone until now: it has had the card for long enough.
        return contender.until_ms is None or contender.until_ms <= now_ms

    def _begin_turn(self, contender: _Contender, now_ms: int, wanted_at: dict[DeviceUuid, int]) -> None:
        contender.state, contender.since_ms, contender.idle_since_ms = "has-turn", now_ms, None
        rivals = self._rivals(contender)
        contender.until_ms = now_ms + self._length(contender, rivals) if rivals else None
        claims = [wanted_at[card] for card in contender.cards if card in wanted_at]
        if claims and contender.until_ms is not None:
            contender.until_ms = max(now_ms + 1, min(contender.until_ms, *claims))

    def _length(self, contender: _Contender, rivals: Iterable[_Contender]) -> int:
        everybody = [contender, *rivals]
        turn_round = self._settings.quantum_ms * len(everybody)
        length = turn_round * contender.weight // sum(one.weight for one in everybody)
        return max(self._settings.shortest_ms, length)

    def _end_turn(self, contender: _Contender, now_ms: int) -> None:
        contender.state, contender.until_ms, contender.off_ms, contender.idle_since_ms = "waits", None, now_ms, None

    def _rest_if_idle(self, contender: _Contender, now_ms: int) -> None:
        since = contender.idle_since_ms
        if contender.state != "has-turn" or since is None or not self._settings.idle_ms:
            return
        if now_ms >= since + self._settings.idle_ms and self._rivals(contender):
            contender.state, contender.until_ms = "rests", None

    def _settle(self, contender: _Contender, now_ms: int) -> None:
        if contender.state == "has-turn":
            contender.had += (now_ms - contender.since_ms) * _SCALE // contender.weight
        contender.since_ms = now_ms

    def _level(self, contender: _Contender, now_ms: int) -> None:
        """Not behind those that it competes with: what it did not use is no claim."""
        rivals = self._rivals(contender)
        for one in rivals:
            self._settle(one, now_ms)
        if rivals:
            contender.had = max(contender.had, min(one.had for one in rivals))


def party_of(key: AssignmentKey) -> Party:
    return (key.job, key.attempt)
