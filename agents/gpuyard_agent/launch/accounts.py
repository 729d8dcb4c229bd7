"""Which Unix account a tenant's user runs as on this node.

A policy is one account for everybody (`run_as = "jobs"`), or rules by `tenant/user` with `*` for any and `{tenant}` and
`{user}` to be filled in (`run_as = {"acme/*" = "acme-{user}", "*/*" = "guest"}`). The most exact rule counts. Shares
under MPS may have rules of their own, since MPS serves one uid at a time on a card: `run_shares_as = "gy-{tenant}"`.

Without a policy everything runs as the agent's own account, or, when the agent is root, as whoever called sudo, or else
as `nobody`. Never as uid 0, whatever the policy says; and an agent that is not root can only use its own account.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Mapping
from typing import TypeAlias

from gpuyard_agent.launch.base import Account
from gpuyard_protocol.names import Tenant, User

RunAs: TypeAlias = str | Mapping[str, str]

#: How long an account that was looked up stays known: a directory service may take long to answer.
_KNOWN_S = 60.0
_NOBODY = "nobody"


class AccountMissing(Exception):
    """There is no account for this user here, or none that may be used; the text says which and why."""

    code = "AccountMissing"


def default_run_as() -> str:
    """The account that jobs run as when no policy says otherwise."""
    own = os.geteuid()
    if own != 0:
        return _name_of(own)
    invoking = os.environ.get("SUDO_UID", "")
    return _name_of(int(invoking)) if invoking.isdigit() and int(invoking) != 0 else _NOBODY


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"  # a uid without an entry, as containers like to have: taken as a number below


class AccountPolicy:
    """The rules of one node."""

    def __init__(self, run_as: RunAs = "", run_shares_as: RunAs = "") -> None:
        """ "" means the default. Raises `ValueError` for a rule that can never hold, naming it."""
        self._rules = _rules("run_as", run_as or default_run_as())
        #: For shares; where none matches, the others count.
        self._share_rules = _rules("run_shares_as", run_shares_as) if run_shares_as else {}
        #: Accounts looked up lately, with when.
        self._known: dict[str, tuple[float, Account]] = {}

    def resolve(self, tenant: Tenant, user: User, *, shares_card: bool = False) -> Account:
        """The account. May ask a directory service. Raises `AccountMissing`."""
        template = _match(self._share_rules, tenant, user) if shares_card else ""
        template = template or _match(self._rules, tenant, user)
        if not template:
            raise AccountMissing(f"no rule of this node says which account {tenant}/{user} runs as")
        return self._look_up(template.replace("{tenant}", tenant).replace("{user}", user), f"{tenant}/{user}")

    def patterns(self) -> tuple[str, ...]:
        """For whom there is an account here, as `tenant/user` patterns; a rule to be filled in counts as holding."""
        return tuple(pattern for pattern, template in sorted(self._rules.items()) if self._holds(template))

    def accounts(self) -> tuple[Account, ...]:
        """Those that rules name outright and that exist, by name."""
        templates = sorted({*self._rules.values(), *self._share_rules.values()})
        named = [template for template in templates if "{" not in template and self._holds(template)]
        return tuple([self._look_up(name, "anybody") for name in named])

    def _holds(self, template: str) -> bool:
        if "{" in template:
            return True
        try:
            self._look_up(template, "anybody")
        except AccountMissing:
            return False
        return True

    def _look_up(self, name: str, whom: str) -> Account:
        known = self._known.get(name)
        if known is not None and known[0] > time.monotonic() - _KNOWN_S:
            return known[1]
        account = _read_account(name, whom)
        own = os.geteuid()
        if account.uid == 0:
            raise AccountMissing(f"{whom} would run as {name}, which is uid 0: jobs never run as root")
        if own not in (0, account.uid):
            raise AccountMissing(
                f"{whom} would run as {name} (uid {account.uid}), "
                f"but this agent is not root and can only use its own account (uid {own})"
            )
        self._known[name] = (time.monotonic(), account)
        return account


def _read_account(name: str, whom: str) -> Account:
    try:
        entry = pwd.getpwuid(int(name[1:])) if name.startswith("#") else pwd.getpwnam(name)
    except KeyError:
        if name.startswith("#") and int(name[1:]) == os.geteuid():
            return Account(name=name[1:], uid=os.geteuid(), gid=os.getegid())
        raise AccountMissing(f"there is no account {name!r} on this node, which {whom} should run as") from None
    groups = tuple(group for group in os.getgrouplist(entry.pw_name, entry.pw_gid) if group != entry.pw_gid)
    return Account(
        name=entry.pw_name,
        uid=entry.pw_uid,
        gid=entry.pw_gid,
        groups=groups,
        home=entry.pw_dir or "/",
        shell=entry.pw_shell or "/bin/sh",
    )


def _rules(setting: str, run_as: RunAs) -> dict[str, str]:
    rules = {"*/*": run_as} if isinstance(run_as, str) else dict(run_as)
    for pattern, template in rules.items():
        if pattern.count("/") != 1 or not all(pattern.split("/")):
            raise ValueError(f"{setting}: found {pattern!r}; expected 'tenant/user', with '*' for any")
        filled = template.replace("{tenant}", "").replace("{user}", "")
        if not template or "{" in filled or "}" in filled:
            raise ValueError(
                f"{setting}: found {template!r}; expected an account, with {{tenant}} and {{user}} filled in"
            )
    return rules


def _match(rules: Mapping[str, str], tenant: Tenant, user: User) -> str:
    for pattern in (f"{tenant}/{user}", f"{tenant}/*", f"*/{user}", "*/*"):
        if pattern in rules:
            return rules[pattern]
    return ""
