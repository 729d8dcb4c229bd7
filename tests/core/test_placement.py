"""Where jobs go: the tightest card and node, in order of priority and arrival, and never where they may not."""

from __future__ import annotations

from gpuyard_daemon.core.state.settings import CoreSettings
from gpuyard_protocol.nodes import Inventory, Start
from gpuyard_protocol.resources import MpsShare, NoGpu, TimeSliceShare, WholeCards
from support.builders import CoreHarness, gpu, job, node


def harness(*inventories: Inventory, **settings: int) -> CoreHarness:
    h = CoreHarness(CoreSettings(**settings))
    h.join(*inventories)
    return h


def test_a_job_is_placed_in_the_turn_that_brings_it() -> None:
    h = harness(node("n-1", 1))
    number = h.submit(job(gpus=1))
    assert number == 1
    assert h.partitions_of(number) == [WholeCards(("GPU-n-1-0",))]
    (start,) = h.new_orders(Start)
    assert (start.key, start.hold, start.launch.argv) == ((1, 1, 0), False, ("/bin/true",))
    assert [event.state for event in h.events] == ["starting"]


def test_whole_cards_come_from_the_node_with_the_fewest_to_spare() -> None:
    h = harness(node("n-1", 8), node("n-2", 2), node("n-3", 4))
    assert h.nodes_of(h.submit(job(gpus=2))) == ["n-2"]
    assert h.nodes_of(h.submit(job(gpus=2))) == ["n-3"]
    assert h.nodes_of(h.submit(job(gpus=2))) == ["n-3"]
    assert h.nodes_of(h.submit(job(gpus=8))) == ["n-1"]


def test_shares_fill_the_fullest_card_before_the_next_is_cut() -> None:
    h = harness(node("n-1", 2), node("n-2", 2))
    placed = [h.partitions_of(h.submit(job(share_milli=milli)))[0] for milli in (500, 200, 300, 400)]
    assert [share.device for share in placed if isinstance(share, MpsShare)] == ["GPU-n-1-0"] * 3 + ["GPU-n-1-1"]


def test_a_share_goes_to_the_card_it_fills_best() -> None:
    h = harness(node("n-1", 2))
    first, second = h.submit(job(share_milli=600)), h.submit(job(share_milli=500))
    assert h.partitions_of(first) != h.partitions_of(second)
    third = h.submit(job(share_milli=400))
    assert h.view(third).placed[0].devices == h.view(first).placed[0].devices


def test_time_slices_spread_over_idle_cards_before_they_over_subscribe() -> None:
    h = harness(node("n-1", 2))
    wanted = job(share_milli=800, share_memory_mib=1000, isolation="none")
    devices = [h.partitions_of(h.submit(wanted))[0] for _ in range(4)]
    names = [share.device for share in devices if isinstance(share, TimeSliceShare)]
    assert sorted(names[:2]) == ["GPU-n-1-0", "GPU-n-1-1"]
    assert sorted(names[2:]) == ["GPU-n-1-0", "GPU-n-1-1"]


def test_work_without_gpus_stays_away_from_them() -> None:
    h = harness(node("n-1", 8), node("n-2", 0))
    number = h.submit(job())
    assert h.nodes_of(number) == ["n-2"]
    assert h.partitions_of(number) == [NoGpu()]


def test_cpus_and_memory_are_counted() -> None:
    h = harness(node("n-1", 8, cpu_milli=4000, memory_mib=8192))
    assert h.states(*h.submit_many([job(gpus=1, cpu_milli=2000)] * 3)) == ["starting", "starting", "pending"]
    h = harness(node("n-1", 8, cpu_milli=64_000, memory_mib=8192))
    assert h.states(*h.submit_many([job(gpus=1, memory_mib=4096)] * 3)) == ["starting", "starting", "pending"]


def test_models_labels_names_and_card_memory_are_honoured() -> None:
    a100 = [gpu(0, node="n-2", model="NVIDIA A100-SXM4-40GB", memory_mib=40_192)]
    h = harness(node("n-1", 1), node("n-2", devices=a100, labels={"zone": "b"}), node("n-3", 1))
    assert h.nodes_of(h.submit(job(gpus=1, models=("A100",)))) == ["n-2"]
    assert h.nodes_of(h.submit(job(node_labels=(("zone", "b"),)))) == ["n-2"]
    assert h.nodes_of(h.submit(job(gpus=1, nodes=("n-3",)))) == ["n-3"]
    assert h.nodes_of(h.submit(job(gpus=1, card_memory_mib=80_000))) == ["n-1"]
    assert h.nodes_of(h.submit(job(nodes=("host-n-1",)))) == ["n-1"]


def test_a_node_without_the_users_account_is_passed_over() -> None:
    h = harness(node("n-1", 1, accounts=("umbrella/*", "acme/bob")), node("n-2", 1))
    assert h.nodes_of(h.submit(job(gpus=1), user="alice")) == ["n-2"]
    assert h.nodes_of(h.submit(job(gpus=1), user="bob")) == ["n-1"]


def test_larger_priority_goes_first_and_equals_in_order_of_arrival() -> None:
    h = harness(node("n-1", 1))
    running = h.submit(job(gpus=1))
    low, first, second, high = h.submit_many([job(gpus=1, priority=p) for p in (-1, 0, 0, 2)])
    order = []
    for _ in range(4):
        h.run(running)
        h.ended(running)
        (running,) = [n for n in (low, first, second, high) if h.state(n) == "starting"]
        order.append(running)
    assert order == [high, first, second, low]


def test_what_does_not_fit_lets_others_pass() -> None:
    h = harness(node("n-1", 4))
    assert h.states(*h.submit_many([job(gpus=3), job(gpus=4), job(gpus=1)])) == ["starting", "pending", "starting"]


def test_a_blocked_shape_starts_when_a_node_makes_room() -> None:
    h = harness(node("n-1", 2))
    first = h.submit(job(gpus=2))
    waiting = h.submit_many([job(gpus=1), job(share_milli=500), job(share_milli=500)])
    assert h.states(*waiting) == ["pending"] * 3
    h.run(first)
    h.ended(first)
    assert h.states(*waiting) == ["starting"] * 3


def test_a_turn_starts_at_most_its_bound_and_says_that_it_is_not_done() -> None:
    h = harness(node("n-1", 0), starts_per_turn=3)
    numbers = h.submit_many([job()] * 7)
    assert h.last.unfinished
    assert h.states(*numbers).count("starting") == 3
    h.turn()
    assert h.last.unfinished
    h.turn()
    assert not h.last.unfinished
    assert h.states(*numbers) == ["starting"] * 7


def test_a_turn_counts_its_starts_and_the_proof_that_nothing_more_fits() -> None:
    h = harness(node("n-1", 3), starts_per_turn=2)
    numbers = h.submit_many([job(gpus=1)] * 4)
    assert h.last.decisions == 2
    h.turn()
    assert h.last.decisions == 2  # the third start, and that the fourth has to wait
    h.run(numbers[0])
    assert h.last.decisions == 0
    h.ended(numbers[0])
    assert (h.states(numbers[3]), h.last.decisions) == (["starting"], 1)


def test_a_late_comer_of_higher_priority_goes_before_what_a_full_turn_left_over() -> None:
    """Its shape was in line already, behind another shape of the same priority that came after it."""
    h = harness(node("n-1", 8), starts_per_turn=1)
    first, left_over = h.submit_many([job(gpus=1), job(gpus=1)])
    assert h.states(first, left_over) == ["starting", "pending"]
    urgent, other = h.submit_many([job(gpus=1, priority=1), job(share_milli=500, priority=1)])
    assert h.states(urgent, other, left_over) == ["starting", "pending", "pending"]
    h.turn()
    assert h.states(other, left_over) == ["starting", "pending"]


def test_an_idle_turn_leaves_nothing() -> None:
    h = harness(node("n-1", 1))
    turn = h.core.handle([], h.now_ms + 5000, h.core.cursors)
    assert (turn.record, turn.orders, turn.notices, turn.unfinished) == (None, (), (), False)


def test_the_clock_never_goes_back() -> None:
    h = harness(node("n-1", 1))
    before = h.core.now_ms
    h.now_ms -= 60_000
    number = h.submit(job(gpus=1))
    view = h.view(number)
    assert (h.core.now_ms, view.submitted_ms) == (before, before)


def test_thousands_waiting_are_not_looked_at_one_by_one() -> None:
    """A turn that frees one card judges shapes, not jobs: the same few judgements with ten and with ten thousand."""
    h = harness(node("n-1", 1))
    running = h.submit(job(gpus=1))
    h.turn(*[h.submission(job(gpus=1)) for _ in range(3000)])
    assert h.core.metrics().waiting == 3000
    h.run(running)
    h.ended(running)
    assert h.core.metrics().waiting == 2999
    assert len(h.new_facts(object)) == 4
