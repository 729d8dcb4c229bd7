"""What the command line says of services, from made-up answers of a yard."""

from __future__ import annotations

from gpuyard.cli.scaling import progress
from gpuyard.cli.services import faltering
from gpuyard_protocol.jobs import Why
from gpuyard_protocol.services import ServiceView


def view(**fields: object) -> ServiceView:
    plain = {
        "service": "chat", "tenant": "acme", "user": "alice", "model": "", "version": "", "wanted": 3, "running": 0,
        "starting": 0, "pending": 0, "min_replicas": 0, "max_replicas": 8, "target_concurrency": 16, "concurrency": 40,
        "queue_depth": 0, "generation": 2,
    }  # fmt: skip
    return ServiceView(**plain | fields)  # type: ignore[arg-type]  # the test names the fields it is about


def test_replicas_that_end_by_themselves_are_told_with_where_to_look() -> None:
    crashed = view(crashes=6, crashed_job=27, crash=Why("ExitCode", "replica 0 on node-2 exited with code 127"))
    assert faltering(crashed) == (
        "6 in a row ended by themselves; job 27: replica 0 on node-2 exited with code 127 (more: gpuyard logs --err 27)"
    )
    assert progress(crashed).startswith("service chat: 0 of 3 replicas of generation 2 run; 6 in a row ended")


def test_a_replica_that_ends_well_is_told_too() -> None:
    said = faltering(view(crashes=1, crashed_job=27))
    assert said.startswith("the last replica ended by itself; job 27: it exited with code 0, and a service's replica")


def test_nothing_is_said_where_none_ended_or_all_run_again() -> None:
    assert faltering(view()) == ""
    assert faltering(view(crashes=1, crashed_job=27, running=3)) == ""
