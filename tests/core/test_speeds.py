"""Models of card differ in speed: work goes where it is effective, and is counted by what it had of the fastest."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpuyard_daemon.core.placing.speeds import Speeds
from gpuyard_daemon.core.queueing.ranking import ran_ms
from gpuyard_daemon.core.state.inputs import PolicyChanged
from gpuyard_daemon.core.tenants.policy import Policy
from gpuyard_protocol.codec import Malformed, from_plain
from gpuyard_protocol.jobs import JobRequest
from gpuyard_protocol.resources import WholeCards
from support.builders import CoreHarness, gpu, job, node

HOUR = 3_600_000
FAST, SLOW = "NVIDIA H100 80GB HBM3", "NVIDIA T4"
POLICY = Policy(speeds=(("T4", 500),))


def yard(slow: int = 2, fast: int = 2, *, policy: Policy = POLICY) -> CoreHarness:
    h = CoreHarness()
    h.turn(PolicyChanged(policy=policy))
    whole = ("whole", "mps")
    for name, count, model in (("n-1", slow, SLOW), ("n-2", fast, FAST)):
        h.join(node(name, devices=[gpu(i, node=name, model=model, modes=whole) for i in range(count)]))
    return h


def ran(h: CoreHarness, number: int) -> int:
    return ran_ms(h.core.cluster.jobs[number], h.now_ms)


def test_the_jobs_own_figure_goes_before_the_operators() -> None:
    speeds = Speeds((("A100", 600), ("T4", 200)))
    assert speeds.of("NVIDIA T4") == 200
    assert speeds.of("NVIDIA T4", (("T4", 900),)) == 900
    assert speeds.of("NVIDIA A100-SXM4-40GB", (("T4", 900),)) == 600
    assert speeds.of("NVIDIA H100") == 1000


def test_of_several_names_that_fit_the_slowest_counts() -> None:
    speeds = Speeds((("A100", 800), ("A100 40GB", 600)))
    assert speeds.of("NVIDIA A100-SXM4-40GB") == 600
    assert speeds.of("NVIDIA A100-SXM4-80GB") == 800
    assert speeds.of_name("A100") == 600


def test_work_as_such_goes_to_the_fast_card() -> None:
    h = yard()
    assert h.nodes_of(h.submit(job(gpus=1))) == ["n-2"]


def test_a_job_that_gains_nothing_leaves_the_fast_card_to_others() -> None:
    h = yard()
    assert h.nodes_of(h.submit(job(gpus=1, speeds=(("T4", 1000),)))) == ["n-1"]
    # It takes it all the same where nothing else is free.
    h.submit(job(gpus=1, speeds=(("T4", 1000),)))
    assert h.nodes_of(h.submit(job(gpus=1, speeds=(("T4", 1000),)))) == ["n-2"]


@pytest.mark.parametrize(("own", "where"), [(900, "n-1"), (800, "n-2"), (300, "n-2")])
def test_a_job_goes_where_it_is_effective(own: int, where: str) -> None:
    """On the slow card it loses this, and others lose half: a quarter of that is what the fast one costs it."""
    h = yard()
    assert h.nodes_of(h.submit(job(gpus=1, speeds=(("T4", own),)))) == [where]


def test_shares_too() -> None:
    h = yard()
    assert h.nodes_of(h.submit(job(share_milli=300))) == ["n-2"]
    h = yard()
    assert h.nodes_of(h.submit(job(share_milli=300, speeds=(("T4", 1000),)))) == ["n-1"]


def test_run_time_is_counted_as_on_the_fastest_card() -> None:
    h = yard()
    fast, slow = h.submit(job(gpus=1, models=("H100",))), h.submit(job(gpus=1, models=("T4",)))
    h.run(fast)
    h.run(slow)
    h.turn(after_ms=2 * HOUR)
    assert (ran(h, fast), ran(h, slow)) == (2 * HOUR, HOUR)
    assert h.core.cluster.ranking.attained(h.core.cluster.jobs[slow], h.now_ms) == HOUR
    h.ended(slow)
    assert h.core.cluster.jobs[slow].served_ms == HOUR


def test_a_gang_is_as_slow_as_its_slowest_card() -> None:
    h = yard(slow=1, fast=1)
    gang = h.submit(job(gpus=1, replicas=2))
    h.run(gang)
    assert h.core.cluster.jobs[gang].speed_milli == 500


def test_equal_work_stands_at_an_equal_level_wherever_it_ran() -> None:
    h = yard()
    numbers = [h.submit(job(gpus=1, models=(model,))) for model in ("T4", "H100")]
    for number in numbers:
        h.run(number)
    h.turn(after_ms=6 * HOUR)
    slow, fast = [h.core.cluster.jobs[number] for number in numbers]
    ranking = h.core.cluster.ranking
    assert ranking.natural_of(slow, h.now_ms + 6 * HOUR) == ranking.natural_of(fast, h.now_ms)
    assert ranking.natural_of(slow, h.now_ms) < ranking.natural_of(fast, h.now_ms)


def test_an_estimate_lasts_longer_on_a_slow_card() -> None:
    h = yard(fast=0)
    spec = msgspec.structs.replace(job(gpus=2), estimate_ms=HOUR)
    h.run(h.submit(spec))
    waits = h.submit(spec)
    answer = h.core.why(waits, h.now_ms)
    assert answer is not None
    assert answer.estimate is not None
    assert answer.estimate.at_ms == h.now_ms + 2 * HOUR


def test_tenants_are_charged_by_the_speed_of_what_they_hold() -> None:
    h = yard()
    h.run(h.submit(job(gpus=1, models=("T4",)), tenant="acme"))
    h.run(h.submit(job(gpus=1, models=("H100",)), tenant="umbrella"))
    fairness = h.core.cluster.fairness
    assert fairness.rates()["acme"] * 2 == fairness.rates()["umbrella"]
    h.turn(after_ms=HOUR)
    assert fairness.charged("acme", h.now_ms) * 2 == fairness.charged("umbrella", h.now_ms)


def test_another_policy_changes_what_is_charged_from_then_on() -> None:
    h = yard(policy=Policy())
    number = h.submit(job(gpus=1, models=("T4",)))
    h.run(number)
    before = h.core.cluster.fairness.rates()["acme"]
    h.turn(PolicyChanged(policy=POLICY), after_ms=HOUR)
    assert h.core.cluster.fairness.rates()["acme"] * 2 == before
    charged = h.core.cluster.fairness.charged("acme", h.now_ms)
    h.turn(PolicyChanged(policy=Policy()), after_ms=HOUR)
    later = h.core.cluster.fairness.charged("acme", h.now_ms)
    assert charged < later < 2 * charged
    h.restart()
    h.ended(number)
    assert h.core.cluster.fairness.rates() == {}


def test_usage_says_how_fast_each_model_is() -> None:
    h = yard()
    number = h.submit(job(gpus=1, models=("T4",)))
    h.run(number)
    h.turn(after_ms=HOUR)
    (tenant,) = h.core.usage("acme", h.now_ms).tenants
    (model,) = tenant.models
    assert (model.model, model.speed_milli, model.held_milli_ms) == ("T4", 500, HOUR * 1000)


def asked(**fields: Any) -> Any:
    return from_plain(JobRequest, {"command": ["/bin/true"], "gpus": 1, **fields}).specify().need.speeds


def test_a_job_says_how_fast_models_are_for_it() -> None:
    assert asked() == ()
    assert asked(throughput={"T4": 0.25, "A100": 1}) == (("A100", 1000), ("T4", 250))


@pytest.mark.parametrize("wrong", [{"T4": 0}, {"T4": 1.5}, {"": 0.5}, {f"M{n}": 0.5 for n in range(17)}])
def test_and_not_what_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(Malformed, match="throughput"):
        asked(throughput=wrong)


def test_of_one_nodes_cards_too() -> None:
    h = CoreHarness()
    h.turn(PolicyChanged(policy=POLICY))
    models = (FAST, SLOW, FAST, SLOW)
    h.join(node("n-1", devices=[gpu(i, model=model, modes=("whole",)) for i, model in enumerate(models)]))
    indifferent = h.submit(job(gpus=2, speeds=(("T4", 1000),)))
    usual = h.submit(job(gpus=2))
    assert h.partitions_of(indifferent) == [WholeCards(devices=("GPU-n-1-1", "GPU-n-1-3"))]
    assert h.partitions_of(usual) == [WholeCards(devices=("GPU-n-1-0", "GPU-n-1-2"))]
