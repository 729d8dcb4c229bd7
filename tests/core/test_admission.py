"""Requests: accepted, refused with what is missing, answered again; and who may cancel what."""

from __future__ import annotations

import pytest

from gpuyard_daemon.core.state.inputs import CancelRequested, RequestMalformed
from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_protocol.jobs import JobSpec, SubmissionAnswer
from gpuyard_protocol.nodes import Stop
from support.builders import CoreHarness, gpu, job, need, node


@pytest.fixture
def yard() -> CoreHarness:
    h = CoreHarness()
    a30 = [gpu(index, node="n-2", model="NVIDIA A30", memory_mib=24_000, modes=("whole",)) for index in range(2)]
    h.join(
        node("n-1", 4, cpu_milli=64_000, memory_mib=512 * 1024, accounts=("acme/*",)),
        node("n-2", devices=a30, labels={"zone": "b"}, accounts=("acme/*", "umbrella/bob")),
    )
    return h


def refusal(h: CoreHarness) -> tuple[str, str, str, str]:
    answer = h.answers[-1]
    assert not answer.accepted
    assert answer.reason is not None
    return answer.reason.code, answer.path, answer.expected, answer.nearest


@pytest.mark.parametrize(
    ("spec", "path", "expected", "near"),
    [
        (job(gpus=5), "$.gpus", "at most 4", "4"),
        (job(gpus=1, models=("H10",)), "$.gpu_model", "one of: A30, H100", "H100"),
        (job(gpus=3, models=("A30",)), "$.gpus", "at most 2", "2"),
        (job(gpus=1, card_memory_mib=100_000), "$.gpu_model", "at most 81152Mi", "81152Mi"),
        (job(share_memory_mib=100_000), "$.gpu_memory", "at most 81152Mi", "81152Mi"),
        (job(mig="1g.11gb"), "$.mig", None, "1g.10gb"),
        (job(share_milli=100, isolation="none", models=("A30",)), "$.isolation", None, ""),
        (job(cpu_milli=200_000), "$.cpus", "at most 128", "128"),
        (job(memory_mib=4 * 1024 * 1024), "$.memory", "at most 1024Gi", "1024Gi"),
        (job(nodes=("host-n-12",)), "$.nodes", None, "host-n-2"),
        (job(node_labels=(("zone", "c"),)), "$.node_labels", "one of: zone=b", "zone=b"),
        (job(replicas=3, gpus=2), None, None, None),
        (job(replicas=4, gpus=2), "$.replicas", "at most 3", "3"),
        (job(gpus=1, cpu_milli=100_000, models=("H100",)), "$.cpus", None, "64"),
    ],
)
def test_what_no_node_could_ever_run_is_refused_with_the_nearest_that_exists(
    yard: CoreHarness, spec: JobSpec, path: str | None, expected: str | None, near: str | None
) -> None:
    number = yard.submit(spec)
    if path is None:
        assert number
        return
    assert number == 0
    found = refusal(yard)
    assert found[:2] == ("Impossible", path)
    assert expected in (None, found[2])
    assert found[3] == near


def test_a_user_without_an_account_anywhere_is_refused(yard: CoreHarness) -> None:
    assert yard.submit(job(gpus=1), tenant="umbrella", user="carol") == 0
    assert refusal(yard)[0] == "Impossible"
    assert "umbrella/carol" in yard.refused().text
    assert yard.submit(job(gpus=1), tenant="umbrella", user="bob")


def test_a_busy_or_lost_node_makes_nothing_impossible(yard: CoreHarness) -> None:
    yard.submit(job(gpus=4))
    assert yard.state(yard.submit(job(gpus=4))) == "pending"


def test_allow_pending_keeps_the_impossible_until_a_node_brings_it(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=8, allow_pending=True))
    assert yard.state(number) == "pending"
    yard.join(node("n-3", 8))
    assert yard.state(number) == "starting"


def test_without_any_node_there_is_nothing_to_compare_with() -> None:
    h = CoreHarness()
    number = h.submit(job(gpus=500))
    assert h.state(number) == "pending"
    answer = h.core.why(number)
    assert answer is not None
    assert answer.summary == "no node has joined yet"


def test_a_chosen_id_gets_the_first_answer_again_and_one_job(yard: CoreHarness) -> None:
    first = yard.submit(job(gpus=1), submission_id="train-7")
    again = yard.submit(job(gpus=2), submission_id="train-7")
    assert first == again == 1
    assert yard.answers[0] == yard.answers[1]
    assert len(yard.core.cluster.jobs) == 1


def test_a_refusal_is_answered_again_too(yard: CoreHarness) -> None:
    assert yard.submit(job(gpus=9), submission_id="train-8") == 0
    assert yard.submit(job(gpus=1), submission_id="train-8") == 0
    assert yard.answers[0] == yard.answers[1]


def test_ids_are_a_tenants_own(yard: CoreHarness) -> None:
    first = yard.submit(job(), submission_id="same", tenant="acme")
    other = yard.submit(job(), submission_id="same", tenant="umbrella", user="bob")
    assert first != other
    assert yard.core.submission("acme", "same") == yard.answers[0]
    assert yard.core.submission("umbrella", "same") == yard.answers[1]
    assert yard.core.submission("nobody", "same") is None


def test_a_chosen_id_is_kept_for_seven_days_even_after_its_job_has_gone(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1), submission_id="train-9")
    yard.run(number)
    yard.ended(number)
    yard.settle(most_ms=6 * 86_400_000)
    assert yard.state(number) == "gone"
    assert yard.submit(job(gpus=1), submission_id="train-9") == number
    yard.settle(most_ms=2 * 86_400_000)
    assert yard.submit(job(gpus=1), submission_id="train-9") == number + 1


def test_answers_beyond_the_number_kept_go_oldest_first() -> None:
    h = CoreHarness(CoreSettings(chosen_answers_max=2, retired_per_turn=1))
    for number in range(6):
        h.submit(submission_id=f"job-{number}")
    assert [name for _, name in h.core.cluster.chosen_answers] == ["job-4", "job-5"]


def test_a_malformed_request_is_answered_like_any_other() -> None:
    h = CoreHarness()
    h.turn(
        RequestMalformed(
            tenant="acme", user="alice", submission_id="s9", path="$.gpu", found="2", expected="less", nearest="gpus"
        )
    )
    (answer,) = h.answers
    assert (answer.accepted, answer.path, answer.found, answer.nearest) == (False, "$.gpu", "2", "gpus")
    assert answer.reason is not None
    assert answer.reason.code == "Malformed"


# --- cancel ----------------------------------------------------------------------------------------------------------


def code(answer: SubmissionAnswer) -> str:
    return answer.reason.code if answer.reason else "accepted"


def test_cancelling_a_waiting_job_ends_it_at_once(yard: CoreHarness) -> None:
    running, waiting = yard.submit_many([job(gpus=4), job(gpus=4)])
    assert yard.cancel(waiting).accepted
    assert yard.states(running, waiting) == ["starting", "cancelled"]
    yard.check_no_other_orders()


def test_cancelling_a_running_job_stops_it_and_waits_for_its_end(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=4))
    yard.run(number)
    assert yard.cancel(number).accepted
    (stop,) = yard.new_orders(Stop)
    assert (stop.reason, stop.grace_ms) == ("cancelled", 30_000)
    assert yard.state(number) == "stopping"
    waiting = yard.submit(job(gpus=4))
    assert yard.state(waiting) == "pending"
    yard.stopped(number)
    assert yard.states(number, waiting) == ["cancelled", "starting"]


def test_cancelling_twice_is_one_cancellation(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.cancel(number)
    assert yard.cancel(number).accepted
    yard.check_no_other_orders()


def test_a_job_that_finished_before_its_cancellation_reached_it_has_succeeded(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.run(number)
    yard.cancel(number)
    yard.ended(number)
    assert yard.state(number) == "succeeded"


def test_nobody_cancels_anothers_job(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1), user="alice")
    assert code(yard.cancel(number, user="bob")) == "NotYours"
    assert code(yard.cancel(number, tenant="umbrella")) == "UnknownJob"
    assert yard.state(number) == "starting"


def test_an_unknown_job_is_told_with_the_nearest_of_the_tenants_own(yard: CoreHarness) -> None:
    yard.submit_many([job(), job()], tenant="umbrella", user="bob")
    mine = yard.submit(job())
    answer = yard.cancel(17)
    assert (code(answer), answer.nearest) == ("UnknownJob", str(mine))
    assert code(yard.cancel(1, tenant="nobody")) == "UnknownJob"


def test_what_has_ended_cannot_be_cancelled(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    yard.run(number)
    yard.ended(number, exit_code=1)
    assert code(yard.cancel(number)) == "AlreadyEnded"


def test_a_cancellation_under_a_chosen_id_is_answered_again(yard: CoreHarness) -> None:
    number = yard.submit(job(gpus=1))
    request = CancelRequested(tenant="acme", user="alice", submission_id="stop-it", job=number)
    yard.turn(request)
    yard.stopped(number)
    yard.turn(request)
    assert yard.answers[-1] == yard.answers[-2]
    assert yard.answers[-1].accepted


def test_cards_asked_for_in_all_are_parted_equally_as_large_as_starts_now() -> None:
    h = CoreHarness()
    h.join(node("n-1", 8), node("n-2", 8))
    whole = h.submit(JobSpec(argv=("x",), total_gpus=8, replicas=8, need=need(gpus=1)))
    assert [(p.node, len(p.devices)) for p in h.view(whole).placed] == [("n-1", 8)]
    halves = h.submit(JobSpec(argv=("x",), total_gpus=12, replicas=12, need=need(gpus=1), allow_pending=True))
    # Two of six is the largest that the yard could ever hold, and now there is no room for it.
    spec = h.view(halves).spec
    assert spec is not None
    assert (spec.replicas, spec.need.gpus, spec.need.cpu_milli) == (2, 6, 6000)
    parts = h.submit(JobSpec(argv=("x",), total_gpus=6, replicas=6, need=need(gpus=1)))
    assert [len(p.devices) for p in h.view(parts).placed] == [6]
    assert h.submit(JobSpec(argv=("x",), total_gpus=34, replicas=34, need=need(gpus=1))) == 0
    assert h.answers[-1].path == "$.total_gpus"


def test_cards_asked_for_in_all_before_any_node_is_known_fit_whatever_nodes_come() -> None:
    h = CoreHarness()
    number = h.submit(JobSpec(argv=("x",), total_gpus=6, replicas=6, need=need(gpus=1)))
    h.join(node("n-1", 4))
    h.join(node("n-2", 2))
    assert h.state(number) == "starting"
