"""Which Unix account a tenant's user runs as, and that it is never root."""

from __future__ import annotations

import os
import pwd

import pytest

from gpuyard_agent.launch.accounts import AccountMissing, AccountPolicy, default_run_as

OWN = pwd.getpwuid(os.getuid()).pw_name
#: An account that this process may run jobs as.
USABLE = "nobody" if os.getuid() == 0 else OWN


def test_one_account_for_everybody() -> None:
    account = AccountPolicy(USABLE).resolve("acme", "alice")
    entry = pwd.getpwnam(USABLE)
    assert (account.name, account.uid, account.gid) == (USABLE, entry.pw_uid, entry.pw_gid)
    assert (account.home, account.shell) == (entry.pw_dir, entry.pw_shell)
    assert account.gid not in account.groups


def test_the_most_exact_rule_counts() -> None:
    rules = {"acme/alice": "a", "acme/*": "b", "*/alice": "c", "*/*": "d"}
    policy = AccountPolicy(rules)
    asked = [("acme", "alice"), ("acme", "bob"), ("globex", "alice"), ("globex", "bob")]
    for (tenant, user), account in zip(asked, "abcd", strict=True):
        with pytest.raises(AccountMissing, match=f"no account '{account}' on this node, which {tenant}/{user} should"):
            policy.resolve(tenant, user)


def test_names_are_filled_in() -> None:
    with pytest.raises(AccountMissing, match="no account 'gy-acme-alice'"):
        AccountPolicy("gy-{tenant}-{user}").resolve("acme", "alice")


def test_shares_may_run_as_the_tenants_account() -> None:
    policy = AccountPolicy({"*/*": USABLE}, {"acme/*": "gy-{tenant}"})
    assert policy.resolve("acme", "alice").name == USABLE
    with pytest.raises(AccountMissing, match="'gy-acme'"):
        policy.resolve("acme", "alice", shares_card=True)
    assert policy.resolve("globex", "carol", shares_card=True).name == USABLE, "no rule of its own for shares"


def test_who_has_no_rule_has_no_account() -> None:
    with pytest.raises(AccountMissing, match="no rule of this node says which account globex/carol runs as"):
        AccountPolicy({"acme/*": USABLE}).resolve("globex", "carol")


def test_patterns_are_of_those_who_have_an_account() -> None:
    rules = {"acme/*": USABLE, "globex/*": "no-such-account", "initech/*": "{user}"}
    assert AccountPolicy(rules).patterns() == ("acme/*", "initech/*")


def test_nothing_ever_runs_as_root() -> None:
    with pytest.raises(AccountMissing, match="uid 0: jobs never run as root"):
        AccountPolicy("root").resolve("acme", "alice")
    with pytest.raises(AccountMissing, match="uid 0"):
        AccountPolicy("{user}").resolve("acme", "root")
    with pytest.raises(AccountMissing, match="uid 0"):
        AccountPolicy("#0").resolve("acme", "alice")


@pytest.mark.parametrize(
    ("own", "sudo", "expected"),
    [
        (0, None, "nobody"),
        (0, "0", "nobody"),
        (0, "65534", "nobody"),
        (0, "424242", "#424242"),
        (424242, "7", "#424242"),
    ],
)
def test_without_a_policy_it_is_whoever_started_the_agent_but_not_root(
    monkeypatch: pytest.MonkeyPatch, own: int, sudo: str | None, expected: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: own)
    monkeypatch.delenv("SUDO_UID", raising=False)
    if sudo is not None:
        monkeypatch.setenv("SUDO_UID", sudo)
    assert default_run_as() == expected


def test_an_agent_that_is_not_root_uses_its_own_account_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose uid has no entry, as in many containers."""
    monkeypatch.setattr(os, "geteuid", lambda: 424242)
    assert AccountPolicy().resolve("acme", "alice").uid == 424242
    with pytest.raises(AccountMissing, match="this agent is not root and can only use its own account"):
        AccountPolicy("nobody").resolve("acme", "alice")


@pytest.mark.parametrize(
    ("run_as", "expected"),
    [
        ({"acme": "x"}, "found 'acme'; expected 'tenant/user'"),
        ({"acme/": "x"}, "found 'acme/'"),
        ({"*/*": ""}, "found ''; expected an account"),
        ("{tenants}", "found '{tenants}'; expected an account"),
    ],
)
def test_a_rule_that_can_never_hold_is_refused(run_as: str | dict[str, str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        AccountPolicy(run_as)
