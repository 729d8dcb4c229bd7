"""A desired set that came in pieces is put together before anybody acts on it.

One at a time: a first piece begins anew, whatever was there. A piece that does not follow the one before is a gap, and
the daemon begins again. Whether the whole is taken is the core's business, as for a `Sync` that came in one message.
"""

from __future__ import annotations

from gpuyard_protocol.nodes import Desired, Sync, SyncPart


class OutOfOrder(Exception):
    """This piece does not follow what is there."""


class SyncParts:
    def __init__(self) -> None:
        self._last: SyncPart | None = None
        self._desired: list[Desired] = []

    def take(self, part: SyncPart) -> Sync | None:
        """The whole, when this was its last piece. Raises `OutOfOrder`."""
        if part.part == 1:
            self._last, self._desired = None, []
        elif not self._follows(part):
            self._last, self._desired = None, []
            raise OutOfOrder(f"part {part.part} of {part.parts} at {part.n}: the one before it is not here")
        self._last = part
        self._desired.extend(part.desired)
        if part.part < part.parts:
            return None
        desired = tuple(self._desired)
        self._last, self._desired = None, []
        return Sync(
            node=part.node,
            instance=part.instance,
            epoch=part.epoch,
            n=part.n,
            desired=desired,
            v=part.v,
            clock_ms=part.clock_ms,
            serial=part.serial,
        )

    def _follows(self, part: SyncPart) -> bool:
        last = self._last
        if last is None or (last.part + 1, last.parts) != (part.part, part.parts):
            return False
        return (last.node, last.instance, last.epoch, last.n, last.serial) == (
            part.node,
            part.instance,
            part.epoch,
            part.n,
            part.serial,
        )
