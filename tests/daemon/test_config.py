"""Wrong settings stop the daemon before it starts, and say where and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuyard_daemon.config import EXIT_BAD_CONFIG, DaemonConfig, load, parse_arguments
from gpuyard_daemon.core.tenants.policy import Grant, Policy, TenantLimits
from gpuyard_daemon.process import main
from gpuyard_protocol.nodes import IdleGpu
from gpuyard_protocol.service.settings_file import BadConfig


def complaint(tmp_path: Path, text: str) -> str:
    file = tmp_path / "daemon.toml"
    file.write_text(text)
    with pytest.raises(BadConfig) as caught:
        load(file, {})
    assert str(caught.value).startswith(str(file))
    return str(caught.value).removeprefix(f"{file}: ")


def test_defaults_are_valid() -> None:
    DaemonConfig().validate()


def test_a_misspelt_key_names_the_nearest(tmp_path: Path) -> None:
    assert "did you mean 'log_level'?" in complaint(tmp_path, 'log_levle = "info"\n')
    text = complaint(tmp_path, "[journal]\nsnapshot_recrods = 5\n")
    assert text.startswith("journal.snapshot_recrods:")
    assert "did you mean 'snapshot_records'?" in text


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        ('yard = "Main Street"', "yard", "lower-case letters"),
        ('log_level = "loud"', "log_level", "one of debug, info"),
        ('http = "7790"', "http", "HOST:PORT"),
        ('nats = "http://x"', "nats", "nats://HOST:PORT"),
        ('[journal]\nbudget = "1Mi"', "journal.budget", "at least 64Mi"),
        ("[journal]\nbudget = 5", "journal.budget", "with its unit"),
        ("[journal]\narchive_days = 0", "journal.archive_days", "more than 0"),
        ('[nodes]\nlost_after = "1s"', "nodes.lost_after", "more than 'nodes.suspected_after'"),
        ("history_days = true", "history_days", "an integer"),
        ("[scheduler]\nstarts_per_turn = 0", "scheduler.starts_per_turn", "above 0"),
        ("[tenants.acme]\ngpus_max = -1", "tenants.acme.gpus_max", "a number of GPUs"),
        ("[tenants.acme]\njobs_max = 0", "tenants.acme.jobs_max", "above 0"),
        ("[tenants.Acme]\njobs_max = 1", "tenants.Acme", "lower-case letters"),
        ("[tenants.acme]\ngpu_max = 1", "tenants.acme.gpu_max", "gpus_max"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(tmp_path: Path, text: str, key: str, allowed: str) -> None:
    said = complaint(tmp_path, text + "\n")
    assert said.startswith(key + ":")
    assert allowed in said


def test_a_file_that_is_not_there_or_not_toml(tmp_path: Path) -> None:
    assert "not TOML" in complaint(tmp_path, "yard = \n")
    with pytest.raises(BadConfig, match="No such file"):
        load(tmp_path / "other.toml", {})


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text('yard = "one"\nhttp = "127.0.0.1:1"\n')
    config = parse_arguments(["--config", str(file), "--yard", "two", "--state", str(tmp_path), "--no-authentication"])
    assert (config.yard, config.http, config.state_directory) == ("two", "127.0.0.1:1", tmp_path)
    assert config.seed("daemon") is None
    assert parse_arguments(["--state", str(tmp_path)]).seed("daemon") == tmp_path / "keys" / "daemon.seed"


def test_the_process_refuses_with_its_own_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--state", str(tmp_path), "--yard", "No Yard"])
    assert ended.value.code == EXIT_BAD_CONFIG
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "yard: found 'No Yard'" in captured.err


def test_a_tenants_own_table_goes_before_the_default_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text(
        "[tenants.default]\ngpus_max = 4\n[tenants.acme]\njobs_max = 5\n"
        "[tenants.big]\ngpus_max = 0\nbacklog_max = '1Gi'\n"
    )
    policy, usual = load(file, {}).policy(), 512 * 2**20
    assert policy.default == TenantLimits(4000, 100_000, bytes_max=usual)
    assert dict(policy.tenants) == {
        "acme": TenantLimits(4000, 5, bytes_max=usual),
        "big": TenantLimits(0, 100_000, bytes_max=2**30),
    }
    assert DaemonConfig().policy() == Policy(default=TenantLimits(0, 100_000, bytes_max=usual))


def test_a_queue_has_a_rule_about_idle_cards_or_leaves_it_to_those_above(tmp_path: Path) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text('[queues.lab]\nidle_gpu_warn = "5m"\nidle_gpu_release = "1h"\n[queues.night]\nparent = "lab"\n')
    lab, night = load(file, {}).policy().queues
    assert lab.idle == IdleGpu(warn_ms=300_000, release_ms=3_600_000)
    assert night.idle is None


def test_speeds_of_models_become_the_policys(tmp_path: Path) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text("[gpu_speeds]\nT4 = 0.2\nA100 = 0.5\n")
    assert load(file, {}).policy().speeds == (("A100", 500), ("T4", 200))
    file.write_text("[gpu_speeds]\nT4 = 2.0\n")
    with pytest.raises(BadConfig, match=r"gpu_speeds\.T4"):
        load(file, {})


def test_queues_become_a_tree_with_quotas(tmp_path: Path) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text(
        """
        [queues.lab]
        grants = [{nominal = 64}]
        [queues.vision]
        parent = "lab"
        weight = 3
        grants = [{model = "H100", kind = "shared", nominal = 2.5, borrow = 0, lend = 1}]
        [tenants.research]
        queue = "vision"
        weight = 2
        """
    )
    policy = load(file, {}).policy()
    lab, vision = policy.queues
    assert (lab.name, lab.grants) == ("lab", (Grant(nominal_milli=64_000),))
    assert (vision.parent, vision.weight) == ("lab", 3)
    assert vision.grants == (Grant(model="H100", kind="shared", nominal_milli=2500, borrow_milli=0, lend_milli=1000),)
    assert dict(policy.tenants)["research"] == TenantLimits(
        jobs_max=100_000, queue="vision", weight=2, bytes_max=512 * 2**20
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[queues.a]\nparent = "b"', "queues.a.parent: found 'b'; expected one of a"),
        ('[queues.a]\nparent = "b"\n[queues.b]\nparent = "a"', "a queue that does not stand below this one"),
        ("[queues.a]\nweight = 0", "queues.a.weight: found '0'; expected a number between 1 and 1000"),
        ("[queues.a]\ngrants = [{nominal = 1, lend = 2}]", "queues.a.grants.lend: found '2'; expected at most 1"),
        ("[queues.a]\ngrants = [{nominal = 1}, {nominal = 2}]", "one for each model and kind"),
        ("[queues.a]\ngrants = [{nominl = 1}]", "nominal"),
        ('[tenants.t]\nqueue = "a"', "tenants.t.queue: found 'a'; expected one of default"),
        ("[tenants.t]\nweight = 0", "tenants.t.weight"),
    ],
)
def test_a_tree_that_makes_no_sense_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)
