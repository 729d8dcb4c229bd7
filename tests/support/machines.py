"""How rule-based machines of hypothesis are run: the same examples each time, and no deadline on a busy machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def machine_settings(examples: int, steps: int) -> settings:
    """So many lives, of so many steps at most each. Rules whose moment does not come are skipped, which is no fault."""
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
