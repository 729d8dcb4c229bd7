"""A yard that grows while it runs: tenants and nodes come and go on the head of a real `gpuyard up`, without a restart,
and the audit tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gpuyard
from gpuyard.errors import Forbidden, GpuyardError
from gpuyard_agent import identity
from gpuyard_daemon.yard.keys import YardKeys
from gpuyard_daemon.yard.tokens import Token
from gpuyard_protocol.bus.nats import connect
from support.yard import Yard, eventually, running_yard

SMALL = {"cpus": "0.1", "memory": "64Mi"}


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=1, simulate="1xH100-80GB") as yard:
        yield yard


def on_head(yard: Yard, *arguments: str) -> str:
    """A command on the head; its standard output."""
    done = yard.cli(*arguments, "--state", str(yard.state))
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(yard: Yard, *arguments: str) -> str:
    done = yard.cli(*arguments)
    assert done.returncode != 0, done.stdout
    return done.stderr


def pids(yard: Yard) -> dict[str, int]:
    running = json.loads((yard.state / "up.json").read_bytes())
    return {name: mark["pid"] for name, mark in running["children"].items()}


async def run_a_job(context: Path) -> str:
    async with gpuyard.connect(context) as client:
        job = await client.submit(command="true", **SMALL)
        return (await job.wait(timeout=30)).state


def test_a_tenant_comes_changes_its_key_and_goes(yard: Yard) -> None:
    before = pids(yard)
    on_head(yard, "tenants", "add", "acme", "--user", "alice", "--user", "bob")
    alice, bob = (yard.state / "clients" / f"acme.{name}" for name in ("alice", "bob"))
    assert asyncio.run(run_a_job(alice)) == "succeeded"
    listed = json.loads(on_head(yard, "tenants", "list", "--json"))
    assert {"acme": {"alice", "bob"}}.items() <= {found["tenant"]: set(found["users"]) for found in listed}.items()

    old = (alice / "user.seed").read_text()
    on_head(yard, "tenants", "rotate", "acme/alice")
    assert (alice / "user.seed").read_text() != old
    assert asyncio.run(run_a_job(alice)) == "succeeded"
    new = (alice / "user.seed").read_text()
    (alice / "user.seed").write_text(old)
    with pytest.raises(Forbidden):
        asyncio.run(run_a_job(alice))
    (alice / "user.seed").write_text(new)

    asyncio.run(_removed_while_connected(yard, bob))
    assert not bob.exists()
    assert asyncio.run(run_a_job(alice)) == "succeeded"
    on_head(yard, "tenants", "remove", "acme")
    assert "acme" not in on_head(yard, "tenants", "list")
    assert pids(yard) == before, "nothing was restarted"


async def _removed_while_connected(yard: Yard, bob: Path) -> None:
    async with gpuyard.connect(bob) as client:
        assert await client.nodes()
        await asyncio.to_thread(on_head, yard, "tenants", "remove-user", "acme/bob")
        with pytest.raises(GpuyardError):
            await client.nodes()


def test_a_user_may_keep_the_key_to_himself(yard: Yard, tmp_path: Path) -> None:
    own = YardKeys.load_or_create(tmp_path / "keys")
    seed = own.add_user("lab", "eve")
    public_key = own.public_tenants()["lab"]["eve"]
    on_head(yard, "tenants", "add", "lab", "--user", "eve", "--public-key", public_key)
    directory = yard.state / "clients" / "lab.eve"
    assert not (directory / "user.seed").exists()
    (directory / "user.seed").write_text(seed.read_text())
    assert asyncio.run(run_a_job(directory)) == "succeeded"
    assert not yard.state.joinpath("keys", "tenants", "lab", "eve.seed").exists()


def test_what_cannot_be_is_refused_with_the_way_out(yard: Yard) -> None:
    state = ("--state", str(yard.state))
    assert "already" in refused(yard, "tenants", "add", "main", *state)
    assert "did you mean 'main'" in refused(yard, "tenants", "add-user", "maim/x", *state)
    assert "no tenant" in refused(yard, "tenants", "rotate", "nobody", *state)
    assert "no public user key" in refused(yard, "tenants", "add", "t2", "--user", "u", "--public-key", "UABC", *state)
    assert "expected lower-case" in refused(yard, "tenants", "add", "UPPER", *state)
    assert "no yard" in refused(yard, "tenants", "list", "--state", "/nowhere")
    assert "already" in refused(yard, "node", "token", "node-1", *state)
    assert "a week at most" in refused(yard, "node", "token", "gpu-9", "--for", "30d", *state)


# -- nodes


@contextlib.contextmanager
def an_agent(place: Path) -> Iterator[None]:
    with (place / "agent.log").open("wb") as log:
        agent = subprocess.Popen(
            [sys.executable, "-m", "gpuyard_agent", "--config", str(place / "etc" / "agent.toml")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        agent.terminate()
        agent.wait(30)


def join(yard: Yard, place: Path, token: str) -> subprocess.CompletedProcess[str]:
    state, config = str(place / "agent"), str(place / "etc" / "agent.toml")
    return yard.cli("node", "join", "--token", token, "--state", state, "--config", config)


def test_a_host_joins_with_a_token_and_a_key_of_its_own(yard: Yard, tmp_path: Path) -> None:
    token = on_head(yard, "node", "token", "gpu-1").strip()
    settings = tmp_path / "etc" / "agent.toml"
    settings.parent.mkdir()
    sample = Path(__file__).parents[2] / "systemd" / "agent.toml"
    settings.write_text(sample.read_text().replace('#simulate = ""', 'simulate = "2xA100-40GB"').replace(":7791", ":0"))
    done = join(yard, tmp_path, token)
    assert done.returncode == 0, done.stderr
    assert settings.read_text().count("\nnode =") == 1
    assert "[labels]" in settings.read_text()
    assert identity.take(tmp_path / "agent", "gpu-1").node == "gpu-1"
    keys = yard.state / "keys"
    assert (keys / "node-gpu-1.pub").exists()
    assert not (keys / "node-gpu-1.seed").exists(), "the seed stays on the host"
    assert Token.from_text(token).seed not in "".join(path.read_text() for path in (keys / "join").iterdir())

    async def is_ready() -> bool:
        async with yard.connect() as client:
            return any(node.node == "gpu-1" and node.state == "ready" for node in await client.nodes())

    with an_agent(tmp_path):
        asyncio.run(eventually(is_ready, "gpu-1 is ready"))


def test_a_token_is_good_for_one_key_and_a_time(yard: Yard, tmp_path: Path) -> None:
    token = on_head(yard, "node", "token", "gpu-2").strip()
    first, second = tmp_path / "first", tmp_path / "second"
    assert join(yard, first, token).returncode == 0
    assert join(yard, first, token).returncode == 0, "an answer that was lost may be asked for again"
    assert "was used before" in join(yard, second, token).stderr
    assert "already" in refused(yard, "node", "token", "gpu-2", "--state", str(yard.state))

    replacing = on_head(yard, "node", "token", "gpu-2", "--replace").strip()
    assert "refuses" in join(yard, second, token).stderr or "does not know" in join(yard, second, token).stderr
    before = (yard.state / "keys" / "node-gpu-2.pub").read_text()
    assert join(yard, second, replacing).returncode == 0
    assert (yard.state / "keys" / "node-gpu-2.pub").read_text() != before

    short = on_head(yard, "node", "token", "gpu-3", "--for", "1ms").strip()
    stderr = join(yard, tmp_path / "third", short).stderr
    assert "expired" in stderr
    assert "is no token" in join(yard, second, replacing[:-9]).stderr
    assert "belongs to the node 'gpu-2'" in join(yard, second, on_head(yard, "node", "token", "gpu-4").strip()).stderr


def test_a_name_that_was_taken_meanwhile_is_refused(yard: Yard, tmp_path: Path) -> None:
    token = on_head(yard, "node", "token", "gpu-5").strip()
    YardKeys.load_or_create(yard.state / "keys").add_node("gpu-5")
    assert "has a key already" in join(yard, tmp_path, token).stderr


# -- the audit


def test_the_audit_tells_who_did_what(yard: Yard) -> None:
    on_head(yard, "tenants", "add", "globex", "--user", "gus")
    context = yard.state / "clients" / "globex.gus"

    async def act() -> None:
        async with gpuyard.connect(context) as client:
            first, *_ = [await client.submit(command="true", **SMALL) for _ in range(3)]
            await first.wait(timeout=30)
        found = gpuyard.load_context(context)
        bus = await connect(found.url, name="test", inbox_prefix="_INBOX.gus", seed=found.key)
        await bus.stream_publish("sub.globex.gus.submit", b'{"command": "true", "nonsense": 1}')
        await bus.close()

    asyncio.run(act())

    def entries() -> list[dict[str, object]]:
        done = yard.cli("audit", "--json")
        assert done.returncode == 0, done.stderr
        found: list[dict[str, object]] = json.loads(done.stdout)
        return found

    async def is_told() -> bool:
        found = await asyncio.to_thread(entries)
        of_gus = [(entry["what"], entry["outcome"]) for entry in found if entry["who"] == "user globex/gus"]
        return ("submit", "accepted") in of_gus and ("request", "Malformed") in of_gus

    asyncio.run(eventually(is_told, "gus is in the audit"))
    found = entries()
    of_gus = [entry for entry in found if entry["who"] == "user globex/gus"]
    assert sum(int(str(entry.get("count", 1))) for entry in of_gus) == 4
    assert {entry.get("where") for entry in of_gus} == {"127.0.0.1"}
    added = [entry for entry in found if entry["what"] == "tenants add" and entry.get("about") == "tenant globex"]
    assert [entry["outcome"] for entry in added] == ["ok"]
    assert str(added[0]["who"]).startswith("account ")
    assert added[0]["where"] == os.uname().nodename
    assert "WHO" in yard.cli("audit").stdout


def test_the_audit_says_from_where_whoever_asks_and_is_gone_at_once(yard: Yard) -> None:
    """Each is somebody made just before, who connects, asks one thing, and ends the connection with its answer."""
    users = {"quick-a": "ann", "quick-b": "bob", "quick-c": "cid"}

    async def ask_and_go(tenant: str, user: str) -> None:
        found = gpuyard.load_context(yard.state / "clients" / f"{tenant}.{user}")
        bus = await connect(found.url, name=user, inbox_prefix=f"_INBOX.{user}", seed=found.key)
        await bus.stream_publish(f"sub.{tenant}.{user}.cancel", b'{"job": 999999}')
        await bus.close()

    for tenant, user in users.items():
        on_head(yard, "tenants", "add", tenant, "--user", user)
        asyncio.run(ask_and_go(tenant, user))
    assert yard.cli("cordon", "nowhere", "--reason", "to be seen").returncode == 1
    found: dict[str, object] = {}

    async def are_told() -> bool:
        done = await asyncio.to_thread(yard.cli, "audit", "--json")
        entries = [entry for entry in json.loads(done.stdout) if entry["what"] in ("cancel", "cordon")]
        found.update({str(entry["who"]).partition(" ")[2]: entry["where"] for entry in entries})
        return len(found) == len(users) + 1

    asyncio.run(eventually(are_told, "all are in the audit"))
    assert set(found) > {f"{tenant}/{user}" for tenant, user in users.items()}
    assert set(found.values()) == {"127.0.0.1"}


def test_the_audit_is_not_for_tenants(yard: Yard) -> None:
    done = yard.cli("--context", str(yard.state / "clients" / "globex.gus"), "audit")
    assert (done.returncode, "names no operator" in done.stderr) == (1, True)
