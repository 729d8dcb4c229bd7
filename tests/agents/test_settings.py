"""Settings and identity of an agent: what is wrong is named, with the nearest right thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuyard_agent import identity
from gpuyard_agent.config import load, parse_arguments
from gpuyard_protocol.service.settings_file import BadConfig


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('node = "node-1"\nsimulate = "1xA30"\n[labels]\nrack = "r1"\n')
    config = parse_arguments(["--config", str(file), "--simulate", "8xH100-80GB", "--label", "rack=r2"])
    assert (config.node, config.simulate, config.labels) == ("node-1", "8xH100-80GB", {"rack": "r2"})


def test_a_misspelt_key_is_named_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('simulat = "1xA30"\n')
    with pytest.raises(BadConfig, match=r"agent\.toml: simulat: found an unknown field.*did you mean 'simulate'"):
        load(file, {})


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("node", "Node_1", "node: found 'Node_1'; expected lower-case letters"),
        ("nats", "127.0.0.1:4222", "nats: found '127.0.0.1:4222'; expected nats://HOST:PORT"),
        ("http", "7791", "http: found '7791'; expected HOST:PORT"),
        ("key", "/nowhere/node.seed", "key: found '/nowhere/node.seed'; expected a file"),
        ("simulate", "8xZ9000", "simulate: "),
        ("run_as", {"acme": "x"}, "run_as: found 'acme'; expected 'tenant/user'"),
        ("log_level", "loud", "log_level: found 'loud'; expected one of debug"),
        ("tls_cert", "x.pem", "tls_key: found ''; expected 'tls_cert' and 'tls_key' together"),
        ("labels", {"a=b": "c"}, "labels: found 'a=b'"),
        ("state", 5, "state: found 5; expected"),
        ("suspend_memory", "64", "suspend_memory: found '64'; expected an amount of memory with its unit"),
        ("mps_exclusive", "no", 'mps_exclusive: found "no"; expected true or false'),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(setting: str, value: object, complaint: str) -> None:
    with pytest.raises(BadConfig, match=r"^flags: ") as caught:
        load(None, {setting: value})
    assert complaint in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="No such file"):
        load(tmp_path / "nowhere.toml", {})
    (tmp_path / "broken.toml").write_text("= 1")
    with pytest.raises(BadConfig, match="not TOML"):
        load(tmp_path / "broken.toml", {})


def test_a_label_needs_a_value() -> None:
    with pytest.raises(BadConfig, match="label: found 'rack'; expected NAME=VALUE"):
        parse_arguments(["--label", "rack"])


def test_an_identity_is_minted_once(tmp_path: Path) -> None:
    first = identity.take(tmp_path, "")
    again = identity.take(tmp_path, "")
    assert first.node == again.node
    assert first.node.startswith("n-")
    assert first.instance != again.instance


def test_a_given_name_is_kept_and_must_match(tmp_path: Path) -> None:
    assert identity.take(tmp_path, "node-1").node == "node-1"
    assert identity.take(tmp_path, "node-1").node == "node-1"
    with pytest.raises(identity.IdentityRefused, match="belongs to node 'node-1', not to 'node-2'"):
        identity.take(tmp_path, "node-2")


@pytest.mark.parametrize("text", ["node = 5", "node = 'No Name'", "nod", ""])
def test_a_broken_identity_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.toml").write_text(text)
    with pytest.raises(identity.IdentityRefused, match=r"node\.toml"):
        identity.take(tmp_path, "")
