"""Changing who is let in, on the head node, while the yard runs: key files, the server's configuration, a reload.

Works alike on the state directory of a running `gpuyard up` and on that of the systemd units; nothing is restarted. A
yard that does not run takes the change in at its next start. Each change goes into the audit, under the account that
made it.
"""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from gpuyard.cli.output import remark
from gpuyard.errors import GpuyardError
from gpuyard_daemon.yard.accounts import API_INBOX
from gpuyard_daemon.yard.home import Home
from gpuyard_daemon.yard.init import check_owner
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.reload import apply_keys
from gpuyard_daemon.yard.server_files import ConfigurationError, Server, read_server
from gpuyard_protocol.audit import AUDIT_HEAD, AuditBatch, AuditEntry
from gpuyard_protocol.bus import nats
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.codec import encode
from gpuyard_protocol.names import Tenant, User


class Head:
    """One state directory, its keys and its server."""

    def __init__(self, state: Path) -> None:
        """`GpuyardError` if there is no yard here, or one that belongs to another account."""
        self.state = state.absolute()
        if not self.state.is_dir():
            raise GpuyardError(f"there is no yard at {self.state} (another place: --state DIR)")
        check_owner(self.state)
        try:
            self.server: Server = read_server(self.state, runs_here=Home(self.state).is_held())
        except ConfigurationError as error:
            raise GpuyardError(str(error)) from None
        self.keys = YardKeys.load_or_create(self.state / "keys")

    async def apply(self, what: str, about: str, *, new_users: Iterable[tuple[Tenant, User]] = ()) -> bool:
        """Let the server take in the keys as they are now; False if no server runs. Recorded as `what` was done."""
        try:
            is_running = await apply_keys(self.server, self.keys, new_users=new_users)
        except (ConfigurationError, BusError) as error:
            await self._record(what, about, "failed")
            raise GpuyardError(f"the keys are changed, but the server has not taken them in: {error}") from None
        if is_running:
            await self._record(what, about, "ok")
        return is_running

    async def _record(self, what: str, about: str, outcome: str) -> None:
        entry = AuditEntry(
            at_ms=time.time_ns() // 1_000_000,
            who=f"account {_account()}",
            where=socket.gethostname(),
            what=what,
            about=about,
            outcome=outcome,
        )
        try:
            bus = await nats.connect(
                self.server.local_url,
                name="gpuyard audit",
                inbox_prefix=API_INBOX,
                seed=self.server.key_file(self.keys.api),
                tls_ca=self.server.tls_ca,
            )
            try:
                await bus.stream_publish(AUDIT_HEAD, encode(AuditBatch(entries=(entry,))))
            finally:
                await bus.close()
        except BusError as error:
            remark(f"note: the audit does not have it ({error})")


def _account() -> str:
    """Who typed it: the login, and for root the one who called sudo."""
    name = getpass.getuser()
    sudo = os.environ.get("SUDO_USER", "")
    return f"{name} (sudo of {sudo})" if sudo and os.geteuid() == 0 else name
