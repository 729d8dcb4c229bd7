"""A whole yard in simulated time: production cores on modelled hosts and a bad network, and everything that goes wrong.

Two halves. While faults happen, only safety is demanded (`witness`): nothing is lost, run twice or given twice. Then
everything heals, and liveness is: every job ends, nothing is left behind, and the daemon's view is the world.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from faults import head as heads
from faults import node as nodes
from faults.head import Head, HeadDisk
from faults.host import WALL_START_MS, Host
from faults.network import FaultyBroker, Weather
from faults.node import AgentProcess
from faults.scale import SMALL, Scale
from faults.tenants import SERVICES, TENANTS, Tenants
from faults.virtual_time import SimulatedLoop
from faults.witness import Witness
from gpuyard_daemon.core.invariants import check
from gpuyard_daemon.core.scheduler import Scheduler
from gpuyard_daemon.core.state.inputs import LoadReported, NodeCordonAsked, NodeUncordonAsked, PolicyChanged
from gpuyard_daemon.core.tenants.policy import Grant, Policy, QueuePolicy, TenantLimits
from gpuyard_protocol.jobs import FINAL_STATES
from gpuyard_protocol.nodes import Inventory
from support.builders import node as inventory

#: Lines of what happened that a long simulation keeps.
LOG_KEPT = 1000
#: What happens most: processes die, in quick succession; or hosts are cut off for long while the yard goes on.
Kind: TypeAlias = Literal["crashes", "partitions"]


class LivenessViolated(Exception):
    """All is well again, and still something does not come to its end."""


class World:
    """One simulation. Everything random comes from `seed`."""

    def __init__(self, seed: int, scale: Scale = SMALL) -> None:
        self.scale = scale
        self.rng = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self.witness = Witness(scale)
        self.broker = FaultyBroker(self.rng, lambda: WALL_START_MS + int(self._loop.time() * 1000))
        self.broker.on_stored = self.witness.stored
        self.disk = HeadDisk()
        self.heads: list[Head] = []
        self.hosts = [
            Host(self._inventory(number), self.witness, self.rng)
            for number in range(1, self.rng.randint(scale.hosts[0] + 1, scale.hosts[1] + 1))
        ]
        self.agents: dict[str, AgentProcess] = {}
        self.weather = {name: Weather() for name in ("tenants", *(host.name for host in self.hosts))}
        #: Hosts and cards refuse now and then.
        self.has_trouble = False
        #: No process starts anew by itself: the simulation is over.
        self.is_over = False
        self.failure: BaseException | None = None
        self._processes = 0
        self.tenants = Tenants(self.broker, self.weather["tenants"], self.rng, self._fail, scale)
        self._log: list[str] = []

    def _inventory(self, number: int) -> Inventory:
        made = inventory(f"n-{number}", self.rng.choice((2, 4)), keeps_leases=True)
        switch_ms = self.rng.choice((0, 0, 2000))
        cards = tuple([msgspec.structs.replace(card, mig_switch_ms=switch_ms) for card in made.devices])
        return msgspec.structs.replace(made, devices=cards, suspend_mib=self.rng.choice((0, 170_000, 500_000)))

    def note(self, what: str) -> None:
        self._log.append(f"{self._loop.time():9.3f}  {what}")
        if self.scale.forgets and len(self._log) > 2 * LOG_KEPT:
            del self._log[:LOG_KEPT]

    @property
    def log(self) -> list[str]:
        return self._log

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            self.note(f"FAILED: {error!r}")

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure
        assert isinstance(self._loop, SimulatedLoop)
        for message, error in self._loop.failures:
            raise AssertionError(f"nobody expected this: {message}: {error!r}") from error

    # --- processes ---

    def start(self) -> None:
        self.start_head()
        for host in self.hosts:
            self.start_agent(host)

    def start_head(self) -> Head:
        self._processes += 1
        head = Head(
            self._processes,
            self.broker,
            Weather(),
            self.disk,
            self.witness,
            on_failure=self._fail,
            on_death=self._head_died,
            scale=self.scale,
        )
        self.heads.append(head)
        self.note(f"head {head.number} starts")
        return head

    @property
    def head(self) -> Head:
        """The newest."""
        return self.heads[-1]

    def _head_died(self, head: Head) -> None:
        self.note(f"head {head.number} died")
        self.heads = [known for known in self.heads if known.is_alive or known is self.head]
        if head is self.head:
            self._later(self.rng.uniform(0.1, 5.0), lambda: self._replace_head(head))

    def _replace_head(self, dead: Head) -> None:
        if self.head is dead:
            self.start_head()

    def start_agent(self, host: Host) -> None:
        self._processes += 1
        self.agents[host.name] = AgentProcess(
            host,
            self._processes,
            self.broker,
            self.weather[host.name],
            has_trouble=lambda: self.has_trouble,
            beat_s=self.scale.beat_s,
            on_failure=self._fail,
            on_death=self._agent_died,
        )
        self.note(f"agent {self.agents[host.name].instance} starts")

    def _agent_died(self, host: Host) -> None:
        self.note(f"agent {self.agents[host.name].instance} died")
        self._later(self.rng.uniform(0.1, 8.0), lambda: self._replace_agent(host))

    def _replace_agent(self, host: Host) -> None:
        if not self.agents[host.name].is_alive:
            self.start_agent(host)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        if not self.is_over:
            self._loop.call_later(seconds, action)

    # --- faults ---

    async def suffer(self, steps: int, kind: Kind = "crashes") -> None:
        """So many things happen, good and bad."""
        things: dict[str, tuple[Callable[[], None], int, int]] = {
            "submit": (self._submit, 30, 30),
            "cancel": (self._cancel, 6, 2),
            "direct": (self._direct, 6, 3),
            "policy": (self._policy, 3, 1),
            "cordon": (self._cordon, 2, 1),
            "apply_service": (self.tenants.apply_service, 3, 1),
            "change_service": (self.tenants.change_service, 1, 1),
            "load": (self._load, 4, 1),
            "head_dies": (self._head_dies, 8, 1),
            "second_head": (self._second_head, 3, 1),
            "agent_dies": (self._agent_dies, 10, 5),
            "reboot": (self._reboot, 4, 1),
            "weather_changes": (self._weather_changes, 10, 2),
            "server_dies": (self._server_dies, 4, 1),
            "line_breaks": (self._line_breaks, 4, 2),
            "host_vanishes": (self._host_vanishes, 4, 25),
            "clock_steps": (self._clock_steps, 3, 3),
            "trouble_changes": (self._trouble_changes, 3, 1),
        }
        column, pauses = (1, (0.0, 0.01, 0.3, 1.0, 3.0)) if kind == "crashes" else (2, (0.3, 1.0, 3.0, 10.0, 20.0))
        weights = [row[column] for row in things.values()]
        for _ in range(steps):
            name = self.rng.choices(list(things), weights)[0]  # type: ignore[arg-type]  # numbers all
            self.note(name)
            things[name][0]()
            await asyncio.sleep(self.rng.choice(pauses))
            self.raise_failure()

    def _submit(self) -> None:
        for _ in range(self.rng.randint(1, 4)):
            if self._may_submit():
                self.tenants.submit_job(self.witness.twin.cluster.last_job)

    def _may_submit(self) -> bool:
        scale = self.scale
        if not scale.open_jobs_max:
            return self.tenants.submitted < scale.jobs_max
        open_jobs = sum(1 for job in self.witness.twin.cluster.jobs.values() if not job.is_final)
        return open_jobs < scale.open_jobs_max

    def _cancel(self) -> None:
        jobs = [job for job in self.witness.twin.cluster.jobs.values() if not job.is_final and not job.service]
        if jobs:
            job = self.rng.choice(jobs)
            whole_array = {"array": True} if job.array and self.rng.random() < 0.3 else {}
            self.tenants.direct(job.tenant, job.id, "cancel", **whole_array)

    def _direct(self) -> None:
        jobs = self.witness.twin.cluster.jobs.values()
        jobs = [job for job in jobs if not job.is_final and not job.service]
        if not jobs:
            return
        job, rng = self.rng.choice([job for job in jobs if job.live or job.held_by] or jobs), self.rng
        whole_array = {"array": True} if job.array and rng.random() < 0.3 else {}
        if job.is_elastic and rng.random() < 0.5:
            self.tenants.direct(job.tenant, job.id, "scale", replicas=rng.randint(1, 6))
        elif job.held_by:
            self.tenants.direct(job.tenant, job.id, rng.choice(("resume", "release")), **whole_array)
        elif job.live:
            verb = rng.choice(("suspend", "suspend", "suspend", "requeue"))
            self.tenants.direct(job.tenant, job.id, verb, **whole_array)
        else:
            self.tenants.direct(job.tenant, job.id, "hold", **whole_array)

    def _policy(self) -> None:
        """One tenant has a part of the yard, the other takes what is left; or both share all of it."""
        day, night = self.rng.sample([tenant for tenant, _ in TENANTS], 2)
        tenants = sorted(((day, TenantLimits(queue="day")), (night, TenantLimits(queue="night"))))
        grant = Grant(nominal_milli=self.rng.choice((2000, 6000)))
        queues = (QueuePolicy("day", grants=(grant,)), QueuePolicy("night", scavenger=True))
        self.head.add_fact(
            PolicyChanged(policy=self.rng.choice((Policy(), Policy(tenants=tuple(tenants), queues=queues))))
        )

    def _cordon(self) -> None:
        name = self.rng.choice(self.hosts).name
        if self.rng.random() < 0.5:
            self.head.add_fact(NodeCordonAsked(node=name, by="root", requeue=self.rng.random() < 0.5))
        else:
            self.head.add_fact(NodeUncordonAsked(node=name, by="root"))

    def _load(self) -> None:
        tenant, _ = self.rng.choice(TENANTS)
        load = LoadReported(tenant=tenant, service=self.rng.choice(SERVICES), concurrency=self.rng.randint(0, 12))
        if self.head.core is not None and self.head.core.has_service(tenant, load.service):
            self.head.add_fact(load)

    def _head_dies(self) -> None:
        if self.rng.random() < 0.3:
            self.head.kill()
        else:
            self.head.doomed_at = self.rng.choice(heads.POINTS)
            self.note(f"  doomed {self.head.doomed_at}")

    def _second_head(self) -> None:
        """The leader is cut off, and another takes over while the old one still believes in itself."""
        old = self.head
        if not old.leads:
            return
        old.weather.deaf = self.rng.random() < 0.8
        old.weather.mute = not old.weather.deaf or self.rng.random() < 0.5
        self._later(self.rng.uniform(0.0, 20.0), lambda: self._open_line(old))
        self.start_head()

    def _open_line(self, head: Head) -> None:
        head.weather.deaf = head.weather.mute = False
        if head.bus is not None:
            head.bus.hear_again()

    def _agent_dies(self) -> None:
        agent = self.agents[self.rng.choice(self.hosts).name]
        if self.rng.random() < 0.3:
            agent.kill()
        else:
            agent.doomed_at = self.rng.choice(nodes.POINTS)
            self.note(f"  {agent.instance} doomed {agent.doomed_at}")

    def _reboot(self) -> None:
        host = self.rng.choice(self.hosts)
        self.note(f"  {host.name}")
        host.reboot()
        if not self.agents[host.name].is_alive:
            return
        self.agents[host.name].kill()

    def _weather_changes(self) -> None:
        rng = self.rng
        lines = [*self.weather.values(), self.head.weather]
        for weather in rng.sample(lines, rng.randint(1, len(lines))):
            is_bad = rng.random() < 0.6
            weather.loss = rng.choice((0.0, 0.02, 0.2)) if is_bad else 0.0
            weather.duplicate = rng.choice((0.0, 0.1, 0.3)) if is_bad else 0.0
            weather.reorder = is_bad and rng.random() < 0.5
            weather.straggle = rng.choice((0.0, 0.05, 0.2)) if is_bad else 0.0
            weather.delay_max_s = rng.choice((0.002, 0.05, 1.5)) if is_bad else 0.002
            weather.mute = is_bad and rng.random() < 0.15
            weather.deaf = is_bad and rng.random() < 0.15
        self._hear_again()

    def _hear_again(self) -> None:
        for party in [*self.heads, *self.agents.values()]:
            if party.bus is not None:
                party.bus.hear_again()

    def _server_dies(self) -> None:
        if self.broker.is_running:
            self.broker.stop()
            self._later(self.rng.uniform(0.01, 10.0), self.broker.start)

    def _line_breaks(self) -> None:
        party = self.rng.choice([self.head, self.tenants, *self.agents.values()])
        bus = party.bus
        if bus is not None and party.is_alive:
            bus.cut()
            self._later(self.rng.uniform(0.01, 40.0), bus.heal)

    def _host_vanishes(self) -> None:
        """Cut off for so long that it is lost; what it sent, or was sent, arrives when it is back."""
        weather = self.weather[self.rng.choice(self.hosts).name]
        weather.mute = weather.deaf = True
        self._later(self.rng.uniform(20.0, 150.0), lambda: self._back_again(weather))

    def _back_again(self, weather: Weather) -> None:
        weather.mute = weather.deaf = False
        self._hear_again()

    def _clock_steps(self) -> None:
        step_ms = self.rng.choice((-3_600_000, -5_000, 5_000, 3_600_000))
        if self.rng.random() < 0.5:
            self.disk.wall_error_ms += step_ms
        else:
            self.rng.choice(self.hosts).wall_error_ms += step_ms

    def _trouble_changes(self) -> None:
        self.has_trouble = not self.has_trouble

    # --- healing ---

    async def heal(self) -> None:
        """No more faults, and every service is deleted. Everything must come to its end."""
        self.note("heal")
        self.has_trouble = False
        for weather in [*self.weather.values(), *(head.weather for head in self.heads)]:
            weather.loss = weather.duplicate = weather.straggle = 0.0
            weather.mute = weather.deaf = weather.reorder = False
            weather.delay_max_s = 0.002
        for party in [*self.heads, *self.agents.values()]:
            party.doomed_at = ""
        self._hear_again()
        deadline = self._loop.time() + self.scale.healed_max_s
        await asyncio.sleep(45.0)  # until every cut line is open and every process runs again
        self.tenants.delete_services()
        while (problem := self.unfinished()) and self._loop.time() < deadline:
            self._let_go()
            await asyncio.sleep(5.0)
            self.raise_failure()
        self.raise_failure()
        if problem:
            raise LivenessViolated(problem)
        self._check_end()

    def _let_go(self) -> None:
        """Nothing is limited, cordoned or held any more, once whoever leads has heard it."""
        core = self.head.core
        if core is None or not self.head.leads:
            return
        if core.policy != Policy():
            self.head.add_fact(PolicyChanged(policy=Policy()))
        for node in core.cluster.nodes.values():
            if node.cordoned_by:
                self.head.add_fact(NodeUncordonAsked(node=node.id, by="root"))
        for job in core.cluster.jobs.values():
            if job.held_by and not job.is_final:
                self.tenants.direct(job.tenant, job.id, "resume")

    def unfinished(self) -> str:
        """What has not come to its end; "" if all is quiet."""
        core = self.head.core
        if core is None or not self.head.leads:
            return "no daemon leads"
        if self.tenants.under_way:
            return f"{self.tenants.under_way} requests are under way"
        if core.turn != self.witness.records:
            return f"the daemon is at turn {core.turn}, its journal at {self.witness.records}"
        for job in core.cluster.jobs.values():
            if job.state not in FINAL_STATES:
                return f"job {job.id} is {job.state}: {job.story}"
        for host in self.hosts:
            if problem := self._unfinished_on(host, core):
                return f"{host.name}: {problem}"
        for sent in self.tenants.submissions:
            if sent.is_acknowledged and core.submission(sent.tenant, sent.submission_id) is None:
                return f"submission {sent.submission_id} was acknowledged and has no answer"
        return ""

    def _unfinished_on(self, host: Host, core: Scheduler) -> str:
        agent = self.agents[host.name]
        if not agent.is_alive or agent.core is None:
            return "its agent does not run"
        if host.running:
            return f"{[process.key for process in host.running]} run"
        if host.processes:
            return f"the launcher still keeps {sorted(host.processes)}"
        if host.made:
            return f"partitions of {sorted(host.made)} are left"
        if agent.core.live or host.ledger.rows:
            return f"its ledger holds {sorted(host.ledger.rows)}"
        if host.ledger.outbox:
            return f"{len(host.ledger.outbox)} reports are not delivered"
        if core.desired(host.name)[1]:
            return f"the daemon wants {core.desired(host.name)[1]} there"
        if core.node_state(host.name) != "ready":
            return f"the daemon takes it for {core.node_state(host.name)}"
        return ""

    def _check_end(self) -> None:
        """The daemon's view is the world."""
        core = self.head.core
        assert core is not None
        check(core.cluster)
        assert core.digest() == self.witness.twin.digest(), "the leader's state is not what its journal says"
        assert core.cluster.pool.held_milli == 0, "cards are held for nobody"
        assert not any(run.is_running for run in self.witness.runs.values()), "a process was left behind"
        for job in core.cluster.jobs.values():
            assert self.witness.ended[job.id] == job.state, f"job {job.id}"
            runs = [self.witness.runs.get(assignment.key) for assignment in job.assignments]
            if job.state == "succeeded":
                ends = [(run.exit_code, run.signal) if run is not None else None for run in runs]
                assert ends == [(0, 0)] * len(runs) != [], f"job {job.id} succeeded with {ends}"
        for sent in self.tenants.submissions:
            answer = core.submission(sent.tenant, sent.submission_id)
            accepted = self.witness.accepted.get((sent.tenant, sent.submission_id), 0)
            if sent.is_acknowledged:
                assert answer is not None
                assert answer.job == accepted, f"{sent} was told {answer}, and became job {accepted}"
