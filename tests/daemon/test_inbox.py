"""What one turn takes: bounded, reports first, nobody starved."""

from __future__ import annotations

from gpuyard_daemon.core.state.inputs import (
    Cursors,
    Input,
    JobSubmitted,
    LoadReported,
    NodeDeclaredDead,
    NodeLost,
    NodeReported,
    NodeSuspected,
    YardStarted,
)
from gpuyard_daemon.inbox import (
    HIGH_WATER_MESSAGES,
    LOW_WATER_MESSAGES,
    TURN_BYTES_MAX,
    TURN_CORE_S,
    TURN_INPUTS_MAX,
    TURN_INPUTS_MIN,
    Inbox,
    Waiting,
)
from gpuyard_protocol.jobs import JobSpec

JOB = JobSubmitted(tenant="acme", user="alice", submission_id="s1", spec=JobSpec(argv=("true",)))
REPORT = NodeReported(node="n-1", instance="i", boot_id="b", first=1, reports=())


def waiting(sequence: int, size: int, inputs: tuple[Input, ...]) -> Waiting:
    return Waiting(sequence, size, inputs, came_at=float(sequence))


def inbox() -> Inbox:
    return Inbox(Cursors(10, 20), wake=lambda: None)


def test_an_empty_inbox_gives_nothing_and_keeps_its_place() -> None:
    assert inbox().take() == ([], Cursors(10, 20), [])


def test_a_turn_takes_at_most_its_bytes() -> None:
    box = inbox()
    for number in range(10):
        box.submissions.put(waiting(11 + number, TURN_BYTES_MAX // 4, (JOB,)))
    assert box.take().cursors == Cursors(14, 20)
    assert box.take().cursors == Cursors(18, 20)
    assert box.take().cursors == Cursors(20, 20)
    assert not box


def test_a_message_above_the_bound_gets_a_turn_of_its_own() -> None:
    box = inbox()
    box.submissions.put(waiting(11, 10, (JOB,)))
    box.submissions.put(waiting(12, TURN_BYTES_MAX * 4, (JOB,) * 1000))
    box.submissions.put(waiting(13, 10, (JOB,)))
    assert [len(box.take().inputs) for _ in range(3)] == [1, 1000, 1]


def test_reports_go_first_and_leave_room_for_submissions() -> None:
    box = inbox()
    for number in range(2000):
        box.reports.put(waiting(21 + number, 10, (REPORT,)))
        box.submissions.put(waiting(11 + number, 10, (JOB,)))
    box.pace.inputs = TURN_INPUTS_MAX
    inputs = box.take().inputs
    assert len(inputs) == TURN_INPUTS_MAX
    assert inputs[0] is REPORT
    assert inputs.count(JOB) == TURN_INPUTS_MAX // 4


def test_a_turn_takes_what_the_core_can_decide_in_a_moment() -> None:
    """Much that waits is decided in turns of about that length; one of few inputs says nothing about what many cost."""
    box = inbox()
    for number in range(5000):
        box.submissions.put(waiting(11 + number, 10, (JOB,)))
    each_s, sizes = TURN_CORE_S / 50, list[int]()
    while box:
        taken = box.take()
        sizes.append(len(taken.inputs))
        assert taken.came_at == [float(box.submissions.position - back) for back in reversed(range(sizes[-1]))]
        box.pace.turn_ended(sizes[-1], sizes[-1] * each_s, 0.001)
    assert sum(sizes) == 5000
    assert all(size * each_s <= TURN_CORE_S for size in sizes[2:])
    assert all(size * each_s >= TURN_CORE_S / 2 for size in sizes[2:-1])
    box.pace.turn_ended(1, 60.0, 0.0)
    assert box.pace.inputs == sizes[-2]


def test_a_slow_core_still_gets_several_inputs_a_turn_and_a_fast_one_no_more_than_the_bound() -> None:
    box = inbox()
    for _ in range(20):
        box.pace.turn_ended(TURN_INPUTS_MAX, 10.0, 0.0)
    assert box.pace.inputs == TURN_INPUTS_MIN
    for _ in range(20):
        box.pace.turn_ended(TURN_INPUTS_MAX, 0.0, 0.0)
    assert box.pace.inputs == TURN_INPUTS_MAX


def test_behind_a_slow_disk_a_turn_is_longer_so_that_little_of_the_time_is_waited() -> None:
    box, each_s, append_s = inbox(), TURN_CORE_S / 50, 0.1
    for _ in range(20):
        box.pace.turn_ended(box.pace.inputs, box.pace.inputs * each_s, append_s)
    assert box.pace.inputs * each_s >= 2 * append_s


def test_the_shells_own_facts_come_before_everything_that_is_read() -> None:
    box = inbox()
    box.reports.put(waiting(21, 10, (REPORT,)))
    box.add_fact(NodeSuspected(node="n-1"))
    assert box.take().inputs == [NodeSuspected(node="n-1"), REPORT]


def test_poison_moves_the_cursor_and_gives_no_input() -> None:
    box = inbox()
    box.submissions.put(waiting(11, 10, ()))
    assert box.take() == ([], Cursors(11, 20), [11.0])


def test_a_flood_pauses_its_reader_until_it_is_worked_off() -> None:
    box, calls = inbox(), list[str]()
    box.submissions.pause = lambda: calls.append("pause")
    box.submissions.resume = lambda: calls.append("resume")
    for number in range(HIGH_WATER_MESSAGES + 10):
        box.submissions.put(waiting(11 + number, 1, (JOB,)))
    assert calls == ["pause"]
    while len(box) > LOW_WATER_MESSAGES:
        box.take()
    assert calls == ["pause", "resume"]


def test_of_the_shells_own_facts_the_newest_about_each_node_and_service_waits() -> None:
    """While the journal takes nothing, they grow no further than the yard has nodes and services."""
    box = inbox()
    started = YardStarted(epoch=1)
    box.add_fact(started)
    for round_ in range(100):
        for node in ("n-1", "n-2"):
            box.add_fact(NodeSuspected(node=node))
            box.add_fact(NodeLost(node=node))
        box.add_fact(LoadReported(tenant="acme", service="chat", concurrency=round_))
    dead = NodeDeclaredDead(node="n-1", by="root")
    box.add_fact(dead)
    box.add_fact(dead)
    assert len(box) == 5
    load = LoadReported(tenant="acme", service="chat", concurrency=99)
    assert box.take().inputs == [started, NodeLost(node="n-1"), NodeLost(node="n-2"), load, dead]
