"""Which yard is meant: the order of the places, and what a wrong or missing context file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuyard.context import Context, find_context, load_context, render_context
from gpuyard.errors import NoYard

CONTEXT = Context(yard="main", url="nats://127.0.0.1:4222", tenant="acme", user="alice", key="/keys/alice.seed")


@pytest.fixture(autouse=True)
def _nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUYARD_CONTEXT", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("gpuyard.context.default_state_dir", lambda: tmp_path / "state")


def write(path: Path, context: Context = CONTEXT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_context(context))
    return path


def test_a_context_reads_back_as_it_was_written(tmp_path: Path) -> None:
    assert load_context(write(tmp_path / "c.toml")) == CONTEXT


def test_the_places_count_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = write(tmp_path / "state" / "context.toml")
    assert find_context() == state
    config = write(tmp_path / "config" / "gpuyard" / "context.toml")
    assert find_context() == config
    named = write(tmp_path / "named.toml")
    monkeypatch.setenv("GPUYARD_CONTEXT", str(named))
    assert find_context() == named
    assert find_context(tmp_path / "state") == state


def test_keys_may_stand_beside_the_context(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", Context(yard="m", url="nats://h:1", tenant="t", user="u", key="user.seed"))
    assert load_context(path).key == str(tmp_path / "user.seed")


def test_no_context_says_how_to_get_one() -> None:
    with pytest.raises(NoYard, match="start one with `gpuyard up`"):
        load_context()


def test_a_named_context_that_is_missing_is_an_error_even_where_others_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "state" / "context.toml")
    monkeypatch.setenv("GPUYARD_CONTEXT", str(tmp_path / "gone.toml"))
    with pytest.raises(NoYard, match=r"gone\.toml \(named by \$GPUYARD_CONTEXT\)"):
        load_context()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('yard = "m"\nurll = "nats://h:1"\n', r"\$\.urll.*did you mean 'url'"),
        ('yard = "m"\n', r"\$\.url: found nothing"),
        ("yard = \n", "no TOML"),
    ],
)
def test_a_wrong_context_names_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(NoYard, match=says) as caught:
        load_context(path)
    assert str(path) in str(caught.value)
