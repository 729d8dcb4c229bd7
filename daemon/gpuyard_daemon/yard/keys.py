"""The yard's keys: one nkey per role, operator, node and tenant's user, made here and kept in files.

A key is a seed file (0600, in directories of 0700) that never leaves the machine except by hand; the server's
configuration holds public keys only. A node or user whose seed was made elsewhere is known by a `.pub` file with its
public key.

Layout of the directory:

    daemon.seed  api.seed  sys.seed
    operator-<name>.seed  viewer-<name>.seed      node-<node>.seed | node-<node>.pub
    tenants/<tenant>/<user>.seed | <user>.pub      join/<node>.json: see `gpuyard_daemon.yard.tokens`

What a key may do is decided in `gpuyard_daemon.yard.accounts`; names are checked here because they become subject
tokens and file names.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import nkeys

from gpuyard_daemon.yard.tokens import JoinTokens
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.bus.credentials import read_public_key
from gpuyard_protocol.names import NAME_EXPECTED, NodeId, Tenant, User, is_name

_ROLES = ("daemon", "api", "sys")
_PREFIXES = ("operator-", "viewer-", "node-")
#: A public user key is 56 characters of base32 that begin with U.
_PUBLIC_KEY_LENGTH = 56


class YardKeys:
    """The keys in one directory. Reads the files each time it is asked: they are few, and they are the truth."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @classmethod
    def load_or_create(cls, directory: Path) -> YardKeys:
        """The keys there, with those of the yard's own roles made if they are missing."""
        keys = cls(directory)
        _make_private_directory(directory)
        _make_private_directory(directory / "tenants")
        for role in _ROLES:
            make_seed(directory / f"{role}.seed")
        return keys

    @property
    def directory(self) -> Path:
        return self._directory

    def files(self) -> dict[str, Path]:
        """Where each public key comes from: its seed, or the file with the key alone."""
        own = [self._directory / f"{role}.seed" for role in _ROLES]
        named = [path for prefix in _PREFIXES for path in _key_files(self._directory, prefix)]
        tenants = [path for path in (self._directory / "tenants").iterdir() if path.is_dir()]
        users = [path for tenant in tenants for path in _key_files(tenant, "")]
        return {_public_key(path): path for path in (*own, *named, *users)}

    @property
    def daemon(self) -> Path:
        return self._directory / "daemon.seed"

    @property
    def api(self) -> Path:
        return self._directory / "api.seed"

    @property
    def sys(self) -> Path:
        return self._directory / "sys.seed"

    def operator(self, name: User) -> Path:
        return self._directory / f"operator-{_checked(name)}.seed"

    def viewer(self, name: User) -> Path:
        return self._directory / f"viewer-{_checked(name)}.seed"

    def node(self, node: NodeId) -> Path:
        return self._directory / f"node-{_checked(node)}.seed"

    def user(self, tenant: Tenant, user: User) -> Path:
        return self._directory / "tenants" / _checked(tenant) / f"{_checked(user)}.seed"

    @property
    def tokens(self) -> JoinTokens:
        """Leave for nodes to bring a key of their own."""
        return JoinTokens(self._directory / "join")

    # -- adding and removing; the server learns of it by a reload ---------------------------------------------

    def add_operator(self, name: User) -> Path:
        """The operator's seed file, made if there is none. The same holds for the other `add_*`."""
        self._check_not_both(name, self.viewer(name), "a viewer")
        return make_seed(self.operator(name))

    def add_viewer(self, name: User) -> Path:
        self._check_not_both(name, self.operator(name), "an operator")
        return make_seed(self.viewer(name))

    @staticmethod
    def _check_not_both(name: User, other: Path, what: str) -> None:
        """Both speak on `adm.<name>.`: one name is one person with one set of rights."""
        if other.exists():
            raise BusError(f"{name} is {what} already: remove {other} first, or choose another name")

    def add_node(self, node: NodeId) -> Path:
        return make_seed(self.node(node))

    def add_user(self, tenant: Tenant, user: User) -> Path:
        seed = self.user(tenant, user)
        _make_private_directory(seed.parent)
        return make_seed(seed)

    def trust_node(self, node: NodeId, public_key: str) -> None:
        """Let in a node that made its own key; only its public half is known here. The node's earlier key goes."""
        _trust(self.node(node), public_key)

    def trust_user(self, tenant: Tenant, user: User, public_key: str) -> None:
        _make_private_directory(self.user(tenant, user).parent)
        _trust(self.user(tenant, user), public_key)

    def renew_user(self, tenant: Tenant, user: User) -> Path:
        """A new key in the place of the user's old one."""
        seed = self.user(tenant, user)
        write_private(seed, _new_seed())
        seed.with_suffix(".pub").unlink(missing_ok=True)
        return seed

    def add_tenant(self, tenant: Tenant) -> None:
        """An account without users, as yet."""
        _make_private_directory(self._directory / "tenants" / _checked(tenant))

    def remove_node(self, node: NodeId) -> None:
        _remove(self.node(node))

    def remove_user(self, tenant: Tenant, user: User) -> None:
        """A tenant without users keeps its account, so that its events and jobs stay its own."""
        _remove(self.user(tenant, user))

    def remove_tenant(self, tenant: Tenant) -> None:
        """Its account and all keys of its users."""
        shutil.rmtree(self._directory / "tenants" / _checked(tenant), ignore_errors=True)

    # -- public halves ----------------------------------------------------------------------------------------

    def public_roles(self) -> dict[str, str]:
        """`daemon`, `api`, `sys` -> public key."""
        return {role: read_public_key(str(self._directory / f"{role}.seed")) for role in _ROLES}

    def public_operators(self) -> dict[User, str]:
        return dict(_public_keys(self._directory, "operator-"))

    def public_viewers(self) -> dict[User, str]:
        return dict(_public_keys(self._directory, "viewer-"))

    def public_nodes(self) -> dict[NodeId, str]:
        return dict(_public_keys(self._directory, "node-"))

    def public_tenants(self) -> dict[Tenant, dict[User, str]]:
        tenants = sorted(path for path in (self._directory / "tenants").iterdir() if path.is_dir())
        return {path.name: dict(_public_keys(path, "")) for path in tenants}


def _public_keys(directory: Path, prefix: str) -> Iterator[tuple[str, str]]:
    """Name and public key of each key file that begins with `prefix`, in the order of names."""
    for path in _key_files(directory, prefix):
        yield path.stem.removeprefix(prefix), _public_key(path)


def _key_files(directory: Path, prefix: str) -> Iterator[Path]:
    """Of a seed, or where there is none of a public key."""
    for path in sorted(directory.iterdir()):
        name = path.stem.removeprefix(prefix)
        if not path.name.startswith(prefix) or path.suffix not in (".seed", ".pub"):
            continue
        if not is_name(name):
            raise BusError(f"{path} is no key of the yard: {name!r} is not a name ({NAME_EXPECTED})")
        if path.suffix == ".seed" or not path.with_suffix(".seed").exists():
            yield path


def _public_key(path: Path) -> str:
    return read_public_key(str(path)) if path.suffix == ".seed" else checked_key(path.read_text().strip())


def _checked(name: str) -> str:
    if not is_name(name):
        raise BusError(f"{name!r} is not a name: expected {NAME_EXPECTED}")
    return name


def checked_key(public_key: str) -> str:
    is_base32 = all(letter.isupper() or letter in "234567" for letter in public_key)
    if not public_key.startswith("U") or len(public_key) != _PUBLIC_KEY_LENGTH or not is_base32:
        raise BusError(f"{public_key[:60]!r} is no public user key: expected U and 55 more characters of base32")
    return public_key


def _trust(seed: Path, public_key: str) -> None:
    write_private(seed.with_suffix(".pub"), checked_key(public_key) + "\n")
    seed.unlink(missing_ok=True)


def _new_seed() -> str:
    seed: str = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER).decode()
    return seed + "\n"


def make_seed(path: Path) -> Path:
    """Create a key unless there is one; two who try at once end up with the same."""
    if not path.exists():
        write_private(path, _new_seed(), is_new=True)
    return path


def _make_private_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def write_private(path: Path, text: str, *, is_new: bool = False) -> None:
    """Whole or not at all, readable by its owner alone from its first moment; `is_new` keeps a file already there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove(seed: Path) -> None:
    seed.unlink(missing_ok=True)
    seed.with_suffix(".pub").unlink(missing_ok=True)
