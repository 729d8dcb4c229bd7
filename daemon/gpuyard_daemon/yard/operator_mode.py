"""Accounts told by signed tokens: how several NATS servers, and large sites, know who may do what.

In static mode the accounts stand in a server's configuration, and each change is a reload of that server. Here the
yard has an authority of its own (an *operator* in the words of NATS, no person): it signs one token per account, an
account signs one per user, and the servers believe what that authority signed. Accounts are pushed to one server and
reach all; a new user of a known account needs no word to anybody.

The accounts and rights themselves are those of `accounts.layout`, in either mode. Nobody but the yard's authority can
make an account, so that an import of another tenant's subject can only come from here; the keys of accounts never
leave the head.

    keys/authority/operator.seed   accounts/<account>.seed   issued.json (whose keys were let in, and revoked when)
    beside every seed of keys/:    <name>.creds              what its owner connects with: token and seed

The tokens are NATS' own (JWT, version 2). They carry no expiry and end by revocation, but for the one-time tokens of
hosts, which do both.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import nkeys

from gpuyard_daemon.yard.accounts import JOIN_ACCOUNT, Account, Rights, layout
from gpuyard_daemon.yard.keys import YardKeys, write_private
from gpuyard_protocol.bus.base import BusError
from gpuyard_protocol.bus.credentials import CREDENTIALS_SUFFIX
from gpuyard_protocol.names import NodeId

VERSION = 2
_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}
_UNLIMITED = -1
#: No one-time token lives longer.
_TOKENS_LIVE_S = 8 * 86_400


class Issued(msgspec.Struct):
    """What was let in so far (`issued.json`)."""

    #: Public keys of users now let in, by account.
    users: dict[str, list[str]] = {}
    #: Public keys no longer let in, by account, and since when (seconds since the epoch).
    revoked: dict[str, dict[str, int]] = {}


class Authority:
    """The keys that sign, and what they signed."""

    def __init__(self, keys: YardKeys) -> None:
        self._keys = keys
        self._directory = keys.directory / "authority"
        self._accounts = self._directory / "accounts"
        for directory in (self._directory, self._accounts):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._operator = self._key(self._directory / "operator.seed", nkeys.PREFIX_BYTE_OPERATOR)

    def _key(self, path: Path, prefix: int) -> nkeys.KeyPair:
        if not path.exists():
            seed: bytes = nkeys.encode_seed(secrets.token_bytes(32), prefix)
            write_private(path, seed.decode() + "\n", is_new=True)
        return nkeys.from_seed(bytearray(path.read_bytes().strip()))

    def account_key(self, name: str) -> nkeys.KeyPair:
        return self._key(self._accounts / f"{name}.seed", nkeys.PREFIX_BYTE_ACCOUNT)

    def account_id(self, name: str) -> str:
        return str(self.account_key(name).public_key.decode())

    # -- tokens --------------------------------------------------------------------------------------------------------

    def operator_token(self) -> str:
        subject = str(self._operator.public_key.decode())
        nats = {"type": "operator", "version": VERSION, "system_account": self.account_id("SYS")}
        return sign(self._operator, subject, "gpuyard", nats)

    def account_token(self, account: Account, revoked: Mapping[str, int]) -> str:
        storage = _UNLIMITED if account.has_jetstream else 0
        nats: dict[str, Any] = {
            "type": "account",
            "version": VERSION,
            "imports": [
                {"name": it.subject, "subject": it.subject, "account": self.account_id(it.account), "type": it.kind}
                for it in account.imports
            ],
            "exports": [{"name": it.subject, "subject": it.subject, "type": it.kind} for it in account.exports],
            "limits": {
                **dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), _UNLIMITED),
                **dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), storage),
                "wildcards": True,
            },
        }
        if revoked:
            nats["revocations"] = dict(revoked)
        return sign(self._operator, self.account_id(account.name), account.name, nats)

    def user_token(self, account: Account, user: Rights, name: str, *, expires_s: int = 0) -> str:
        """`expires_s`: seconds since the epoch, 0 for never; a connection does not outlive it either."""
        allowed = {"allow": list(user.publish), **({"deny": list(user.denied)} if user.denied else {})}
        nats = {
            "type": "user",
            "version": VERSION,
            "pub": allowed,
            "sub": {"allow": list(user.subscribe)},
            **dict.fromkeys(("subs", "data", "payload"), _UNLIMITED),
        }
        return sign(self.account_key(account.name), user.key, name, nats, expires_s=expires_s)

    # -- what was let in -----------------------------------------------------------------------------------------------

    def settle(self, accounts: list[Account]) -> Issued:
        """Note whose keys are let in now; those that were before and are not any more are revoked."""
        path = self._directory / "issued.json"
        try:
            issued = msgspec.json.decode(path.read_bytes(), type=Issued) if path.exists() else Issued()
        except msgspec.MsgspecError as error:
            raise BusError(f"{path} is damaged ({error}): without it, keys that were taken away would count") from None
        now_s = int(time.time())
        current = {account.name: [user.key for user in account.users] for account in accounts}
        for name, keys in issued.users.items():
            for key in set(keys) - set(current.get(name, ())):
                issued.revoked.setdefault(name, {})[key] = now_s
        for name, keys in current.items():
            for key in keys:
                issued.revoked.get(name, {}).pop(key, None)
        # Tokens of hosts end by themselves: the list of those that were used does not grow for ever.
        spent = issued.revoked.get(JOIN_ACCOUNT, {})
        for key in [key for key, since_s in spent.items() if now_s - since_s > _TOKENS_LIVE_S]:
            del spent[key]
        issued.users = current
        write_private(path, msgspec.json.encode(issued).decode())
        return issued


def sign(signer: nkeys.KeyPair, subject: str, name: str, nats: Mapping[str, Any], *, expires_s: int = 0) -> str:
    """One token: who (`subject`) may do what (`nats`), by the word of `signer`."""
    claims: dict[str, Any] = {
        "iat": int(time.time()),
        "iss": signer.public_key.decode(),
        "name": name,
        "sub": subject,
        "nats": nats,
        **({"exp": expires_s} if expires_s else {}),
    }
    digest = hashlib.sha256(json.dumps(claims, sort_keys=True).encode()).digest()
    claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
    body = f"{_base64(json.dumps(_HEADER))}.{_base64(json.dumps(claims))}"
    return f"{body}.{_base64(signer.sign(body.encode()))}"


def says_the_same(token: str, other: str) -> bool:
    """Whether two tokens differ in nothing but when they were signed."""
    return _claims(token) == _claims(other)


def _claims(token: str) -> dict[str, Any] | None:
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return None
    return {name: value for name, value in claims.items() if name not in ("iat", "jti")}


def _base64(data: str | bytes) -> str:
    raw = data.encode() if isinstance(data, str) else data
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def account_tokens(yard: str, keys: YardKeys) -> dict[str, str]:
    """The token of each account, by its public key; everybody's credentials are written anew."""
    authority = Authority(keys)
    accounts = layout(yard, keys)
    issued = authority.settle(accounts)
    write_credentials(authority, accounts, keys)
    return {
        authority.account_id(account.name): authority.account_token(account, issued.revoked.get(account.name, {}))
        for account in accounts
    }


def operator_section(yard: str, directory: Path, keys: YardKeys) -> str:
    """The part of a server's configuration that says whom it believes, and what to begin with."""
    tokens = account_tokens(yard, keys)
    authority = Authority(keys)
    preload = "\n".join(f"  {account}: {token}" for account, token in tokens.items())
    return f"""\
operator: {authority.operator_token()}
system_account: {authority.account_id("SYS")}
# Accounts that are pushed to one server reach the others, and stay in this directory.
resolver {{ type: full, dir: {json.dumps(str(directory / "accounts"))}, allow_delete: false, interval: "1m" }}
resolver_preload {{
{preload}
}}
"""


# --- credentials ------------------------------------------------------------------------------------------------------


def write_credentials(authority: Authority, accounts: list[Account], keys: YardKeys) -> None:
    """Beside each seed what its owner connects with. Whoever keeps his seed to himself gets the token alone."""
    files = keys.files()
    for account in accounts:
        for user in account.users:
            path = files.get(user.key)
            if path is None:
                continue  # A one-time token for a host: whoever made it was handed it.
            token = authority.user_token(account, user, path.stem)
            if path.suffix == ".seed":
                write_private(path.with_suffix(CREDENTIALS_SUFFIX), credentials(token, path.read_text().strip()))
            else:
                write_private(path.with_suffix(".jwt"), token + "\n")


def join_credential(keys: YardKeys, yard: str, node: NodeId) -> str:
    """What the host that a one-time token was made for shows with it; it ends with the token."""
    issued = keys.tokens.find(node)
    account = next(account for account in layout(yard, keys) if account.name == JOIN_ACCOUNT)
    rights = next((user for user in account.users if issued is not None and user.key == issued.public_key), None)
    if issued is None or rights is None:
        raise BusError(f"there is no token for {node} that could still be used")
    # The server counts whole seconds; whether the token itself has expired, the daemon looks at to the millisecond.
    return Authority(keys).user_token(account, rights, f"join-{node}", expires_s=issued.expires_ms // 1000 + 1)


def node_credential(keys: YardKeys, node: NodeId) -> str:
    """What a node that keeps its seed to itself is let in with; there once its key is."""
    path = keys.node(node).with_suffix(".jwt")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise BusError(f"cannot read {path}: {error.strerror or error}") from None


def credentials(token: str, seed: str) -> str:
    """The file that NATS' clients know as `.creds`."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    )
