"""`gpuyard demo`: a yard of its own in a temporary place, a workload, a picture, a summary, and nothing left.

Real parts throughout: NATS server, daemon, agents and the jobs' processes; only the cards are modelled. The demo is a
tenant like any other: it submits, listens to its events, asks, and counts from what the yard answers. A job counts as
lost if the yard took it and never brought it to an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import orjson
from rich.console import Console

from gpuyard.client import Client
from gpuyard.errors import Rejected
from gpuyard_daemon.yard import demo_workload, trace_replay
from gpuyard_daemon.yard.demo_workload import Arrival, LoadWave
from gpuyard_daemon.yard.home import free_port
from gpuyard_daemon.yard.live import QUEUE_ROWS, Picture, Scene
from gpuyard_daemon.yard.up import Settings, Yard
from gpuyard_protocol.jobs import FINAL_STATES, JobEvent, JobView
from gpuyard_protocol.queries import JobsQuery, Stats
from gpuyard_protocol.services import ServiceView

CARD_MODEL = "H100-80GB"
TENANT = "demo"
DRAW_EVERY_S = 0.5
REPORT_EVERY_S = 1.0
#: Without any sign of progress for this long (beyond the longest job), what is not final counts as lost.
STALL_S = 60.0
#: Jobs on their way to the yard at once.
SUBMIT_WINDOW = 64
STORE_MIB = 512


class DemoPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What `gpuyard demo` was asked for."""

    seconds: int
    #: None: the mixed workload.
    trace: Path | None
    speed: float
    limit: int | None
    nodes: int
    gpus: int
    as_json: bool


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What the yard is given."""

    title: str
    arrivals: list[Arrival]
    services: list[LoadWave]
    #: Its length if nothing has to wait, and the longest single job.
    expected_s: float
    longest_s: float


async def run_demo(plan: DemoPlan, workload: Workload) -> None:
    """Everything, from the empty directory to the empty directory."""
    console = Console(stderr=plan.as_json)
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, main.cancel)
    state = Path(tempfile.mkdtemp(prefix="gpuyard-demo-"))
    yard = Yard(_settings(plan, state), say=lambda text: console.print(text, style="dim", highlight=False))
    try:
        console.print(f"Starting NATS, the daemon and {plan.nodes} agents in {state} …", style="dim", highlight=False)
        await yard.start()
        assert yard.context is not None
        async with Client(yard.context) as client:
            run = DemoRun(client, workload, Picture(console, workload.title))
            summary = await run.run()
    except asyncio.CancelledError:
        console.print("Stopping …", style="dim")
        raise KeyboardInterrupt from None
    finally:
        yard.hurry.set()
        await asyncio.shield(yard.stop(keep_jobs=False))
        shutil.rmtree(state, ignore_errors=True)
    _print_summary(summary, run, console)
    if plan.as_json:
        sys.stdout.write(orjson.dumps(summary).decode() + "\n")


def _settings(plan: DemoPlan, state: Path) -> Settings:
    return Settings(
        state=state,
        simulate=f"{plan.gpus}x{CARD_MODEL}",
        nodes=plan.nodes,
        port=0,
        http=f"127.0.0.1:{free_port('127.0.0.1')}",
        tenant=TENANT,
        store_mib=STORE_MIB,
    )


def plan_workload(plan: DemoPlan) -> Workload:
    cards = plan.nodes * plan.gpus
    if plan.trace is None:
        return Workload(
            title=f"gpuyard demo: {plan.nodes} nodes × {plan.gpus} simulated {CARD_MODEL}",
            arrivals=demo_workload.jobs(plan.seconds, cards, plan.nodes),
            services=demo_workload.services(cards),
            expected_s=plan.seconds,
            longest_s=plan.seconds / 4,
        )
    jobs = trace_replay.read_trace(plan.trace, plan.limit)
    replay = trace_replay.replay(jobs, plan.speed, plan.gpus, plan.nodes)
    return Workload(
        title=f"gpuyard demo: {len(jobs)} jobs of {plan.trace.name}, {plan.speed:g} times faster, on {cards} GPUs",
        arrivals=replay.arrivals,
        services=[],
        expected_s=max(replay.card_seconds / cards, replay.arrivals[-1].at_s),
        longest_s=max(replay.lengths_s),
    )


class DemoRun:
    """One workload under way."""

    def __init__(self, client: Client, workload: Workload, picture: Picture) -> None:
        self._client = client
        self._workload = workload
        self._picture = picture
        #: Last state heard of each job, by number; also of the services' replicas, which are jobs of their own.
        self._states: dict[int, str] = {}
        #: The jobs that we submitted.
        self._ours: set[int] = set()
        self._names: dict[int, str] = {}
        self._rejected: list[Rejected] = []
        self._begun = time.monotonic()
        self._last_progress = self._begun
        self._changed = asyncio.Event()
        self._first_stats: Stats | None = None
        self._services_end_s = workload.expected_s * demo_workload.SERVICES_UNTIL
        #: Final views, once it is over.
        self.views: list[JobView] = []
        self.service_peaks: Counter[str] = Counter()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begun

    async def run(self) -> dict[str, Any]:
        """The summary."""
        stop_listening = await self._client.listen(self._on_event)
        self._begun = self._last_progress = time.monotonic()
        self._first_stats = await self._client.stats()
        try:
            with self._picture:
                async with asyncio.TaskGroup() as group:
                    drawing = group.create_task(self._repeat(self._draw, DRAW_EVERY_S))
                    serving = group.create_task(self._serve())
                    await self._submit_all()
                    await serving
                    await self._wait_for_the_end()
                    drawing.cancel()
        except ExceptionGroup as group_error:
            raise _first_error(group_error) from None
        finally:
            stop_listening()
        return await self._summarise()

    # -- jobs ----------------------------------------------------------------------------------------------------------

    async def _submit_all(self) -> None:
        slots = asyncio.Semaphore(SUBMIT_WINDOW)

        async def submit(arrival: Arrival) -> None:
            try:
                job = await self._client.submit(arrival.request)
                self._states.setdefault(job.number, "pending")
                self._ours.add(job.number)
                self._names[job.number] = arrival.request.name
            except Rejected as refusal:
                self._rejected.append(refusal)
                self._picture.say(f"rejected: {refusal}")
            finally:
                slots.release()
                self._changed.set()

        async with asyncio.TaskGroup() as group:
            for arrival in self._workload.arrivals:
                await asyncio.sleep(max(0.0, arrival.at_s - self.elapsed_s))
                await slots.acquire()
                group.create_task(submit(arrival))

    def _on_event(self, event: JobEvent) -> None:
        if self._states.get(event.job) in FINAL_STATES:
            return
        before = self._states.get(event.job)
        self._states[event.job] = event.state
        self._last_progress = time.monotonic()
        if event.state != "starting" and not (event.state == "pending" and before is None):
            self._picture.on_event(event, self._names.get(event.job, ""))
        if event.state in FINAL_STATES:
            self._changed.set()

    def _open(self) -> list[int]:
        return [job for job in sorted(self._ours) if self._states[job] not in FINAL_STATES]

    async def _wait_for_the_end(self) -> None:
        """Until every job is final, or nothing has happened for so long that nothing will."""
        patience_s = STALL_S + self._workload.longest_s
        while self._open():
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2.0):
                    await self._changed.wait()
            if time.monotonic() - self._last_progress > 5.0:
                await self._look_for_ends()
            if time.monotonic() - self._last_progress > patience_s:
                return

    async def _look_for_ends(self) -> None:
        """Ask for what events may have failed to say."""
        for job in self._open()[:16]:
            view = await self._client.job(job)
            if view.state != self._states[job]:
                self._states[job] = view.state
                self._last_progress = time.monotonic()

    # -- services ------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Apply the services, let their load come and go, delete them; their replicas are not among our jobs."""
        if not self._workload.services:
            return
        for wave in self._workload.services:
            await self._client.apply(wave.request)
        while self.elapsed_s < self._services_end_s:
            progress = self.elapsed_s / self._services_end_s
            for wave in self._workload.services:
                await self._client.report_load(wave.request.name, wave.concurrency(progress), source="demo")
            await asyncio.sleep(min(REPORT_EVERY_S, self._services_end_s / 20))
        for wave in self._workload.services:
            await self._client.delete(wave.request.name)

    # -- the picture ---------------------------------------------------------------------------------------------------

    async def _repeat(self, work: Callable[[], Coroutine[Any, Any, None]], every_s: float) -> None:
        while True:
            await work()
            await asyncio.sleep(every_s)

    async def _draw(self) -> None:
        nodes, services, stats, queue = await asyncio.gather(
            self._client.nodes(),
            self._services(),
            self._client.stats(),
            self._client.jobs_page(JobsQuery(states=["pending"], limit=200)),
        )
        for view in services:
            self._names.update(dict.fromkeys(view.jobs, f"{view.service} (service)"))
            self.service_peaks[view.service] = max(self.service_peaks[view.service], view.running)
        counts = Counter(self._states[job] for job in self._ours)
        done = counts["succeeded"]
        failed = counts["failed"] + counts["cancelled"] + len(self._rejected)
        self._picture.draw(
            Scene(
                elapsed_s=self.elapsed_s,
                expected_s=self._expected_s(done + failed),
                nodes=nodes,
                services=services,
                queue=await self._with_reasons(tuple(reversed(queue.jobs))),
                submitted=len(self._workload.arrivals),
                waiting=counts["pending"],
                running=counts["running"] + counts["starting"] + counts["stopping"],
                done=done,
                failed=failed,
                held_pct=100 * stats.held_milli / max(1, stats.gpus * 1000),
                allocation_pct=self._allocation_pct(stats),
            )
        )

    async def _with_reasons(self, queue: tuple[JobView, ...]) -> tuple[tuple[JobView, str], ...]:
        if not self._picture.is_live:
            return ()
        shown = queue[:QUEUE_ROWS]
        answers = await asyncio.gather(*(self._client.why(view.job) for view in shown))
        return tuple(
            (view, answer.summary if answer.state == "pending" else "starting")
            for view, answer in zip(shown, answers, strict=True)
        )

    async def _services(self) -> tuple[ServiceView, ...]:
        return await self._client.services() if self._workload.services else ()

    def _expected_s(self, finished: int) -> float:
        """The whole length, as the pace so far suggests once there is one to go by."""
        total = len(self._workload.arrivals)
        if self._workload.services or finished < total / 10:
            return max(self._workload.expected_s, self.elapsed_s)
        return max(self.elapsed_s * total / finished, self._workload.expected_s)

    def _allocation_pct(self, stats: Stats) -> float:
        first = self._first_stats
        assert first is not None
        capacity = stats.capacity_milli_ms - first.capacity_milli_ms
        return 100 * (stats.held_milli_ms - first.held_milli_ms) / capacity if capacity > 0 else 0.0

    # -- the summary ---------------------------------------------------------------------------------------------------

    async def _summarise(self) -> dict[str, Any]:
        seconds = self.elapsed_s
        stats = await self._client.stats()
        self.views = [view async for view in self._client.jobs(all=True) if view.job in self._ours]
        ended = {view.job: view for view in self.views if view.state in FINAL_STATES}
        waits_ms = [view.first_started_ms - view.submitted_ms for view in self.views if view.first_started_ms]
        states = Counter(view.state for view in ended.values())
        return {
            "jobs_submitted": len(self._workload.arrivals),
            "jobs_done": states["succeeded"],
            "jobs_failed": states["failed"] + states["cancelled"] + len(self._rejected),
            "jobs_lost": len(self._ours) - len(ended),
            "avg_wait_s": round(sum(waits_ms) / len(waits_ms) / 1000, 3) if waits_ms else 0.0,
            "gpu_allocation_pct": round(self._allocation_pct(stats), 1),
            "seconds": round(seconds, 1),
        }


def _first_error(group: ExceptionGroup) -> Exception:
    error = group.exceptions[0]
    return _first_error(error) if isinstance(error, ExceptionGroup) else error


def _print_summary(summary: dict[str, Any], run: DemoRun, console: Console) -> None:
    waits_s = sorted((view.first_started_ms - view.submitted_ms) / 1000 for view in run.views if view.first_started_ms)
    lines = [
        f"{summary['jobs_done']} of {summary['jobs_submitted']} jobs done in {summary['seconds']} s, "
        f"{summary['jobs_failed']} failed, {summary['jobs_lost']} lost",
    ]
    if waits_s:
        lines.append(
            f"waits: {summary['avg_wait_s']:.1f} s on average, {waits_s[len(waits_s) // 2]:.1f} s median, "
            f"{waits_s[-1]:.1f} s at most"
        )
    lines.append(f"GPU compute held: {summary['gpu_allocation_pct']} % of all there was, over the whole time")
    if run.service_peaks:
        peaks = ", ".join(f"{name} up to {count}" for name, count in sorted(run.service_peaks.items()))
        lines.append(f"service replicas: {peaks}")
    retried = sum(view.attempt > 1 for view in run.views)
    if retried:
        lines.append(f"jobs that needed a second attempt: {retried}")
    console.print("\n".join(lines), highlight=False)
