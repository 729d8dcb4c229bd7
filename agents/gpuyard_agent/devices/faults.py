"""Which cards are fenced, why, and when one may be tried again.

Pure: times come in, nothing is asked of a card. A fault fences its card at once. From then on the card is due to be
probed, and it returns when a probe finds nothing wrong and its quarantine is over: half a minute after the first fault,
twice as long after each further one within a day, an hour at most. So a card that fails at every use takes fewer and
fewer jobs with it, and one that failed once is not lost to the yard until somebody looks.
"""

from __future__ import annotations

import msgspec

from gpuyard_agent.devices.base import DeviceFault
from gpuyard_protocol.names import DeviceUuid

#: Of the first fault; doubled by each that follows within `MEMORY_S`.
QUARANTINE_S = 30.0
QUARANTINE_S_MAX = 3600.0
MEMORY_S = 86_400.0
#: Between two probes of a fenced card.
PROBE_S = 10.0


class _Fenced(msgspec.Struct, kw_only=True):
    """One card that failed. Kept after its return, for counting."""

    fault: DeviceFault
    #: Faults within the last `MEMORY_S`.
    strikes: int
    last_s: float
    probe_at_s: float
    #: False once it is back.
    is_fenced: bool = True


class FaultBook:
    """Times are those of one monotonic clock, in seconds."""

    def __init__(self, quarantine_s: float = QUARANTINE_S, probe_s: float = PROBE_S) -> None:
        self._quarantine_s = quarantine_s
        self._probe_s = probe_s
        self._cards: dict[DeviceUuid, _Fenced] = {}

    def report(self, fault: DeviceFault, now_s: float) -> bool:
        """Whether this is news: the card was well, or it is an instance's fault and not one reported before."""
        known = self._cards.get(fault.device)
        if known is None:
            self._cards[fault.device] = _Fenced(fault=fault, strikes=1, last_s=now_s, probe_at_s=now_s + self._probe_s)
            return True
        # One event makes several: what comes within the pause of a probe belongs to the fault that is known.
        if not known.is_fenced or now_s - known.last_s > self._probe_s:
            known.strikes = known.strikes + 1 if now_s - known.last_s < MEMORY_S else 1
        is_news = not known.is_fenced or known.fault.mig_uuid != fault.mig_uuid
        if not known.is_fenced:
            known.probe_at_s = now_s + self._probe_s
        known.fault, known.last_s, known.is_fenced = fault, now_s, True
        return is_news

    def fault(self, device: DeviceUuid) -> str:
        """Why it takes nothing, in words; "" for a card that is not fenced."""
        known = self._cards.get(device)
        return known.fault.detail if known is not None and known.is_fenced else ""

    def fenced(self) -> tuple[DeviceUuid, ...]:
        return tuple(sorted(uuid for uuid, known in self._cards.items() if known.is_fenced))

    def due(self, now_s: float) -> tuple[DeviceUuid, ...]:
        """Cards to be probed now. Each is due once; then again after a pause."""
        found = [uuid for uuid in self.fenced() if self._cards[uuid].probe_at_s <= now_s]
        for uuid in found:
            self._cards[uuid].probe_at_s = now_s + self._probe_s
        return tuple(found)

    def probed(self, device: DeviceUuid, problem: str, now_s: float) -> bool:
        """What a probe found ("": nothing wrong). True: the card is back."""
        known = self._cards.get(device)
        if known is None or not known.is_fenced:
            return False
        if problem:
            # Trouble that lasts is one trouble: the quarantine counts from its end.
            known.last_s = now_s
            known.fault = msgspec.structs.replace(known.fault, detail=problem)
            return False
        if now_s < known.last_s + self._quarantine(known.strikes):
            return False
        known.is_fenced = False
        return True

    def _quarantine(self, strikes: int) -> float:
        return min(QUARANTINE_S_MAX, self._quarantine_s * 2.0 ** min(strikes - 1, 20))
