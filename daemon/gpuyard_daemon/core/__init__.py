"""The scheduler: pure, synchronous, deterministic.

`Scheduler.handle(inputs, now_ms, cursors)` is the whole contract: same state, inputs and time give the same output,
byte for byte. No clock, randomness, I/O or asyncio in here; integers for every quantity, a total order in every sort,
ids from counters.

Floors, no import running up: settings, policy → facts, inputs → model, states → partitions → capacity → turn, effects,
timers, listing, arrays, gates, tenancy, node_facts, service_facts → cluster (all state, the one writer) → feasibility →
placement, gangs, order → impossible → draft → answers, dependencies, services → outcomes, admission, directives,
deadlines, round, views, why, snapshot, invariants → scheduler.
"""
