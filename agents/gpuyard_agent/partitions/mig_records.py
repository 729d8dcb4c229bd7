"""Which MIG instances are this agent's: written down before one is made, struck out after it is gone.

The driver does not say who made an instance, and others may make some too (an administrator, another program), which
must be left alone. So the agent keeps a record beside its daemons' files. It is never more than a claim: an instance is
ours if the record names its card, place and profile, and its UUID where that was known. Nothing is forced to the disk:
what makes the last writes vanish, a crash of the host, makes the instances vanish too, and records of another boot are
dropped for the same reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from gpuyard_agent import host
from gpuyard_agent.devices.base import MigInstanceFound
from gpuyard_protocol.names import DeviceUuid


class MigRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One instance that this agent made, or was about to make."""

    device: DeviceUuid
    profile: str
    start: int
    #: "" until it was made.
    mig_uuid: str = ""


class _File(msgspec.Struct, kw_only=True):
    boot_id: str = ""
    records: list[MigRecord] = []


class MigRecords:
    """By card and start: two instances of one card never begin at the same slice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._boot_id = host.boot_id()
        self._records = {(record.device, record.start): record for record in self._load()}

    def owns(self, found: MigInstanceFound) -> bool:
        record = self._records.get((found.device, found.start))
        if record is None or record.profile != found.profile:
            return False
        return not record.mig_uuid or not found.mig_uuid or record.mig_uuid == found.mig_uuid

    def put(self, record: MigRecord) -> None:
        if self._records.get((record.device, record.start)) != record:
            self._records[record.device, record.start] = record
            self._save()

    def drop(self, device: DeviceUuid, start: int) -> None:
        if self._records.pop((device, start), None) is not None:
            self._save()

    def of(self, device: DeviceUuid) -> Iterator[MigRecord]:
        return iter([record for record in self._records.values() if record.device == device])

    def _load(self) -> list[MigRecord]:
        try:
            file = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            # Without it every instance counts as somebody else's, but for those that the ledger names.
            return []
        return file.records if file.boot_id == self._boot_id else []

    def _save(self) -> None:
        file = _File(boot_id=self._boot_id, records=[self._records[place] for place in sorted(self._records)])
        draft = self._path.with_suffix(".new")
        with contextlib.suppress(FileExistsError):
            self._path.parent.mkdir(parents=True)
        draft.write_bytes(msgspec.json.encode(file))
        os.replace(draft, self._path)
