"""The scheduler: pure, synchronous, deterministic.

`Scheduler.handle(inputs, now_ms, cursors)` is the whole contract: same state, inputs and time give the same output,
byte for byte. No clock, randomness, I/O or asyncio in here; integers for every quantity, a total order in every sort,
ids from counters.

Packages: `state` (records, facts, the one writer) and `applying` (what each fact changes in it); `placing`, `tenants`,
`queueing`, `preempting` decide where, how much, who next, who gives way, in this order and without looking up;
`handling` takes inputs; `explaining` answers people and decides nothing. `scheduler` is the entrance, `invariants` the
auditor.
"""
