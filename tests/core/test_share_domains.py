"""Shares meet on a card inside one share domain: the tenant, or what a job narrows it to."""

from __future__ import annotations

from typing import Any

from gpuyard_protocol.nodes import Start
from support.builders import CoreHarness, job, node


def harness(gpus: int) -> CoreHarness:
    h = CoreHarness()
    h.join(node("n-1", gpus))
    return h


def share(**fields: Any) -> Any:
    return job(share_milli=300, **fields)


def cards(h: CoreHarness, *numbers: int) -> list[str]:
    return [h.view(number).placed[0].devices[0] for number in numbers]


def test_jobs_of_one_tenant_share_a_card_only_inside_one_domain() -> None:
    h = harness(2)
    plain = h.submit(share())
    team = h.submit(share(share_domain="team"))
    more = h.submit(share(share_domain="team"))
    other = h.submit(share())
    first, second, third, fourth = cards(h, plain, team, more, other)
    assert first == fourth
    assert second == third
    assert first != second
    (start,) = [order for order in h.orders["n-1"] if isinstance(order, Start) and order.key.job == team]
    assert start.launch.share_domain == "team"


def test_a_domain_waits_for_a_card_of_its_own() -> None:
    h = harness(1)
    first = h.submit(share())
    h.run(first)
    waiting = h.submit(share(share_domain="team"))
    assert h.state(waiting) == "pending"
    why = h.core.why(waiting, h.now_ms)
    assert why is not None
    assert "acme" in why.summary
    h.ended(first)
    assert h.state(waiting) == "starting"
    h.run(waiting)
    h.restart()
    assert h.state(h.submit(share())) == "pending"
    assert h.state(h.submit(share(share_domain="team"))) == "starting"


def test_the_same_name_of_another_tenant_is_another_domain() -> None:
    h = harness(1)
    h.submit(share(share_domain="team"))
    assert h.state(h.submit(share(share_domain="team"), tenant="umbrella")) == "pending"


def test_a_gang_of_shares_keeps_to_its_domain() -> None:
    h = harness(2)
    h.submit(share())
    gang = h.submit(share(replicas=3, share_domain="team"))
    assert len({replica.devices for replica in h.view(gang).placed}) == 1
    assert h.state(h.submit(share(replicas=2, share_domain="other"))) == "pending"
