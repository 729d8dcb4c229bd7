"""Line charts as SVG text, enough to look at a run: axes, a few lines, a legend. No dependency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from gpuyard_daemon.sim.jobs_run import JobsRun

_WIDTH, _HEIGHT, _LEFT, _TOP = 760, 380, 70, 40
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
_POINTS_MAX = 800


class Line(NamedTuple):
    label: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """The chart as one SVG document."""
    x_max = max((x for line in lines for x, _ in line.points), default=1.0) or 1.0
    y_max = max((y for line in lines for _, y in line.points), default=1.0) or 1.0
    wide, high = _WIDTH - _LEFT - 20, _HEIGHT - _TOP - 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="15">{escape(title)}</text>',
        f'<text x="{_LEFT + wide / 2}" y="{_HEIGHT - 8}" font-size="12">{escape(x_label)}</text>',
        f'<text x="12" y="{_TOP - 8}" font-size="12">{escape(y_label)}</text>',
    ]
    for tick in range(5):
        y, x = _TOP + high - high * tick / 4, _LEFT + wide * tick / 4
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_LEFT + wide}" y2="{y}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4}" font-size="11" text-anchor="end">{y_max * tick / 4:.4g}</text>'
        )
        parts.append(
            f'<text x="{x}" y="{_TOP + high + 16}" font-size="11" text-anchor="middle">{x_max * tick / 4:.4g}</text>'
        )
    for number, line in enumerate(lines):
        color = _COLORS[number % len(_COLORS)]
        step = max(1, len(line.points) // _POINTS_MAX)
        path = " ".join(
            f"{_LEFT + wide * x / x_max:.1f},{_TOP + high - high * y / y_max:.1f}" for x, y in line.points[::step]
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(
            f'<text x="{_LEFT + wide - 130}" y="{_TOP + 14 + 14 * number}" font-size="12" fill="{color}">'
            f"{escape(line.label)}</text>"
        )
    parts.append("</svg>")
    return "\n".join(parts)


def draw_job_runs(runs: Sequence[JobsRun], folder: Path) -> list[Path]:
    """Queue, allocation, fragmentation, completion times, and each policy's shares of tenants; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    queue = [Line(run.policy.name, [(t / 3600, waiting) for t, waiting, _ in run.timeline]) for run in runs]
    held = [
        Line(run.policy.name, [(t / 3600, 100 * busy / (run.nodes * run.per_node)) for t, _, busy in run.timeline])
        for run in runs
    ]
    fragments = [_fragmentation(run) for run in runs]
    charts = {
        "queue.svg": line_chart("Jobs waiting", "hours", "jobs", queue),
        "allocation.svg": line_chart("GPUs held", "hours", "per cent", held),
        "fragmentation.svg": line_chart(
            "GPUs idle where a typical job cannot use them", "hours", "per cent", fragments
        ),
        "jct.svg": line_chart("Job completion time", "hours", "per cent of jobs", [_distribution(run) for run in runs]),
    }
    for run in runs:
        title = f"GPUs held by tenants under {run.policy.name}"
        charts[f"tenants-{run.policy.name}.svg"] = line_chart(title, "hours", "per cent", _tenant_lines(run))
    written = []
    for name, text in charts.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _fragmentation(run: JobsRun) -> Line:
    """Idle GPUs that a job of the trace, drawn at random, could not use on their node: too few of them together."""
    sizes = Counter(min(job.gpus, run.per_node) for job in run.jobs)
    total = sum(sizes.values())
    # Of so many free on one node: how many a random job finds of no use there.
    lost = [
        free * sum(count for gpus, count in sizes.items() if gpus > free) / total for free in range(run.per_node + 1)
    ]
    capacity = run.nodes * run.per_node
    points = [
        (at_s / 3600, 100 * sum(nodes * lost[free] for free, nodes in enumerate(levels)) / capacity)
        for at_s, levels in run.free_samples
    ]
    return Line(run.policy.name, points)


def _distribution(run: JobsRun) -> Line:
    times = sorted((job.finish_s - job.submit_s) / 3600 for job in run.jobs)
    return Line(run.policy.name, [(time, 100 * (at + 1) / len(times)) for at, time in enumerate(times)])


def _tenant_lines(run: JobsRun) -> list[Line]:
    """Means over windows that leave about a hundred points."""
    last_hour = max((hour for hour, _ in run.held), default=0)
    window = max(1, last_hour // 100)
    sums: dict[str, dict[int, float]] = {}
    for (hour, tenant), gpu_s in run.held.items():
        of_tenant = sums.setdefault(tenant, {})
        of_tenant[hour // window] = of_tenant.get(hour // window, 0.0) + gpu_s
    largest = sorted(sums.items(), key=lambda item: (-sum(item[1].values()), item[0]))[: len(_COLORS)]
    part = 100 / (window * 3600.0 * run.nodes * run.per_node)
    windows = range(last_hour // window + 1)
    return [
        Line(tenant, [(at * float(window), part * of_tenant.get(at, 0.0)) for at in windows])
        for tenant, of_tenant in largest
    ]
