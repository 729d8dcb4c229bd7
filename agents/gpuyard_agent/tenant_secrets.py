"""Secrets that a node keeps for tenants, and how a replica that names some of them gets them.

    <secrets>/<tenant>/<user>/<NAME>      that user's own, where there is one
    <secrets>/<tenant>/<NAME>             every user's of the tenant

Whoever runs the node puts them there; the yard knows their names alone. A replica finds the text in a variable of that
name. It travels through a file that only the job's account may read and that goes with the replica: on a command line
or in a unit's properties everybody on the host could see it. A node that lacks a secret, or whose secrets others may
read, refuses the replica: the job fails and says so.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from gpuyard_agent.directories import make_own_directory, make_passage
from gpuyard_agent.launch.base import Account
from gpuyard_protocol.names import AssignmentKey, Tenant, User

#: Of one secret; an environment has to hold it.
SECRET_BYTES_MAX = 64 * 1024
_FOLDER_MODE = 0o700
_FILE_MODE = 0o400


class SecretMissing(Exception):
    """A secret is not to be had here; the text says which and why."""

    code = "SecretMissing"


class TenantSecrets:
    """`kept`: where the secrets are. `handed`: a directory for those that replicas were given."""

    def __init__(self, kept: Path, handed: Path, node: str) -> None:
        self._kept = kept
        self._handed = handed
        self._node = node

    async def hand_over(
        self, key: AssignmentKey, tenant: Tenant, user: User, names: Sequence[str], account: Account
    ) -> None:
        """Raises `SecretMissing`, and `OSError` where they cannot be written."""
        if names:
            await asyncio.to_thread(self._write, key, tenant, user, names, account)

    def wrapper(self, key: AssignmentKey, names: Sequence[str]) -> tuple[str, ...]:
        """What goes before the command of a replica, so that it finds them in its environment."""
        if not names:
            return ()
        folder = shlex.quote(str(self._folder(key)))
        lines = [f"{name}=$(cat {folder}/{name}) || exit 126; export {name}" for name in names]
        return ("/bin/sh", "-c", "; ".join([*lines, 'exec "$@"']), "gpuyard-secrets")

    def take_back(self, key: AssignmentKey) -> None:
        """What a replica was given is removed; nothing happens if that was nothing."""
        shutil.rmtree(self._folder(key), ignore_errors=True)

    def _folder(self, key: AssignmentKey) -> Path:
        return self._handed / str(key)

    def _write(self, key: AssignmentKey, tenant: Tenant, user: User, names: Sequence[str], account: Account) -> None:
        texts = {name: self._read(tenant, user, name) for name in names}
        folder = self._folder(key)
        self._handed.parent.mkdir(parents=True, exist_ok=True)
        make_passage(self._handed)
        self.take_back(key)
        folder.mkdir(_FOLDER_MODE)
        for name, text in texts.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(folder / name, flags, _FILE_MODE), "wb") as file:
                file.write(text)
                if os.geteuid() == 0:
                    os.fchown(file.fileno(), account.uid, account.gid)
        make_own_directory(folder, _FOLDER_MODE, account.uid, account.gid)

    def _read(self, tenant: Tenant, user: User, name: str) -> bytes:
        for path in (self._kept / tenant / user / name, self._kept / tenant / name):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise SecretMissing(f"secret {name} of tenant {tenant} on {self._node}: {error.strerror}") from None
            with open(descriptor, "rb") as file:
                return self._checked(file.read(SECRET_BYTES_MAX + 1), os.fstat(descriptor), tenant, name)
        raise SecretMissing(f"node {self._node} keeps no secret {name} for {tenant}/{user}")

    def _checked(self, text: bytes, status: os.stat_result, tenant: Tenant, name: str) -> bytes:
        where = f"secret {name} of tenant {tenant} on {self._node}"
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
            raise SecretMissing(f"{where} is no plain file that its owner alone may read: chmod 600")
        if len(text) > SECRET_BYTES_MAX or b"\0" in text:
            raise SecretMissing(f"{where} has more than {SECRET_BYTES_MAX} bytes, or a NUL: no variable holds that")
        return text
