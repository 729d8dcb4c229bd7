"""Keys on the disk: who can read them, what names they may have, what survives."""

from __future__ import annotations

import asyncio
import re
import stat
from pathlib import Path

import pytest

from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.server_config import ServerSettings, server_config
from gpuyard_protocol.bus.base import BusError


@pytest.fixture
def keys(tmp_path: Path) -> YardKeys:
    return YardKeys.load_or_create(tmp_path / "keys")


def test_only_the_owner_reads_keys(tmp_path: Path, keys: YardKeys) -> None:
    keys.add_node("n1")
    keys.add_operator("olga")
    keys.add_user("acme", "alice")
    keys.trust_user("acme", "bob", keys.public_nodes()["n1"])
    found = [tmp_path / "keys", *(tmp_path / "keys").rglob("*")]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in found}
    assert modes == {
        "keys": 0o700,
        "tenants": 0o700,
        "acme": 0o700,
        "daemon.seed": 0o600,
        "api.seed": 0o600,
        "sys.seed": 0o600,
        "node-n1.seed": 0o600,
        "operator-olga.seed": 0o600,
        "alice.seed": 0o600,
        "bob.pub": 0o600,
    }


def test_keys_stay_the_same_once_made(tmp_path: Path, keys: YardKeys) -> None:
    seed = keys.add_user("acme", "alice").read_text()
    again = YardKeys.load_or_create(tmp_path / "keys")
    assert again.public_roles() == keys.public_roles()
    assert again.add_user("acme", "alice").read_text() == seed


def test_every_key_is_its_own(keys: YardKeys) -> None:
    for name in ("a", "b"):
        keys.add_node(name)
        keys.add_operator(name)
        keys.add_user("acme", name)
    public = [
        *keys.public_roles().values(),
        *keys.public_nodes().values(),
        *keys.public_operators().values(),
        *keys.public_tenants()["acme"].values(),
    ]
    assert len(set(public)) == len(public) == 9
    assert all(re.fullmatch(r"U[A-Z2-7]{55}", key) for key in public)


async def test_two_who_make_the_same_key_at_once_get_the_same(keys: YardKeys) -> None:
    made = await asyncio.gather(*(asyncio.to_thread(keys.add_node, "n1") for _ in range(8)))
    assert len({path.read_text() for path in made}) == 1


def test_a_removed_key_is_gone_and_its_tenant_stays(keys: YardKeys) -> None:
    keys.add_user("acme", "alice")
    keys.remove_user("acme", "alice")
    keys.remove_node("never-there")
    assert keys.public_tenants() == {"acme": {}}


def test_a_node_that_made_its_own_key_is_let_in_by_its_public_half(keys: YardKeys, tmp_path: Path) -> None:
    elsewhere = YardKeys.load_or_create(tmp_path / "elsewhere")
    elsewhere.add_node("n7")
    public = elsewhere.public_nodes()["n7"]
    keys.trust_node("n7", public)
    assert keys.public_nodes() == {"n7": public}


@pytest.mark.parametrize("public", ["", "U", "SUAB", "u" * 56, "A" + "B" * 55, 'U"; exit', "U" + "1" * 55])
def test_what_is_no_public_key_is_refused(keys: YardKeys, public: str) -> None:
    with pytest.raises(BusError, match="no public user key"):
        keys.trust_node("n7", public)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "a.b", "a b", "-a", 'x"', "a" * 64, "é"])
def test_what_is_no_name_is_refused(keys: YardKeys, name: str) -> None:
    for call in (keys.add_node, keys.add_operator, lambda user: keys.add_user("acme", user)):
        with pytest.raises(BusError, match="is not a name"):
            call(name)
    with pytest.raises(BusError, match="is not a name"):
        keys.add_user(name, "alice")


def test_a_damaged_key_is_named(keys: YardKeys) -> None:
    keys.add_node("n1").write_text("nonsense\n")
    with pytest.raises(BusError, match=r"node-n1\.seed holds no nkey seed"):
        keys.public_nodes()


def test_the_configuration_holds_no_seed(keys: YardKeys, tmp_path: Path) -> None:
    keys.add_node("n1")
    keys.add_user("acme", "alice")
    text = server_config(ServerSettings("lab", tmp_path, 10**9), keys)
    assert keys.public_nodes()["n1"] in text
    assert not re.search(r"\bSU[A-Z2-7]{56}\b", text)
