"""Do the baselines reproduce what was published or given for them? One line each; exit code 1 if one does not.

python -m bench.baselines --what jct
python -m bench.baselines --what openb --seeds 10

Allocation is compared at 100 and 130 % arrived, in points; completion times in per cent, which must come within 1 %.
Allocation is that of the very pods and hosts of the published runs (`published_draws`; the first `--seeds` of the ten),
read as they read it: over all arrivals that round to the mark. A placement without chance must come within 0.02 points,
Random, whose choices hang on the race of a parallel filter there, within 0.3.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from bench.sim_options import NODES, answer, parser_of
from gpuyard_daemon.sim.experiments import jobs_result, run_jobs, run_published_fill

#: Points by which a mean may differ: the rounding of the published values to hundredths, and chance where there is any.
POINTS: Final = 0.02
POINTS_BY_CHANCE: Final = 0.3
JCT_PART: Final = 0.01
#: Published runs of each placement.
RUNS: Final = 10

#: Average and p99 completion time and makespan, thousands of seconds, at the restart cost of each model.
JCT: Final[dict[str, dict[str, tuple[int, int, int]]]] = {
    "trace1": {
        "fifo": (11450, 15350, 25219),
        "fifo-skip": (5787, 14819, 23598),
        "sjf": (1963, 15370, 25539),
        "srtf": (1382, 17178, 26034),
        "srsf": (977, 15392, 25974),
        "tiresias": (3307, 14696, 23516),
    },
    "trace3": {
        "fifo": (1054, 1791, 8174),
        "fifo-skip": (521, 4143, 8174),
        "sjf": (248, 5266, 8174),
        "srtf": (191, 4510, 8174),
        "srsf": (184, 3692, 8174),
        "tiresias": (343, 4958, 8174),
    },
    "cluster_trace": {
        "fifo": (945, 1824, 4217),
        "fifo-skip": (620, 2720, 3897),
        "sjf": (268, 2932, 4150),
        "srtf": (245, 2701, 4126),
        "srsf": (231, 3028, 4146),
        "tiresias": (327, 2836, 3981),
    },
}

#: GPU allocation, per cent, at 100 and 130 % arrived.
ALLOCATION: Final[dict[str, dict[str, tuple[float, float]]]] = {
    "default": {
        "random": (86.30, 87.47), "dotprod": (90.62, 90.85), "gpuclustering": (91.65, 91.88),
        "gpupacking": (91.78, 92.00), "bestfit": (92.86, 93.08), "fgd": (95.23, 95.39),
    },
    "multigpu20": {
        "random": (86.92, 88.69), "dotprod": (91.85, 92.06), "gpuclustering": (93.34, 93.56),
        "gpupacking": (93.50, 93.71), "bestfit": (93.73, 93.93), "fgd": (95.53, 95.65),
    },
    "gpushare40": {
        "random": (84.86, 86.00), "dotprod": (89.30, 89.56), "gpuclustering": (89.76, 90.02),
        "gpupacking": (89.77, 90.03), "bestfit": (91.44, 91.69), "fgd": (93.96, 94.15),
    },
    "gpuspec10": {
        "random": (86.26, 87.43), "dotprod": (90.17, 90.39), "gpuclustering": (91.96, 92.18),
        "gpupacking": (92.24, 92.46), "bestfit": (93.10, 93.30), "fgd": (94.66, 94.95),
    },
    "cpu050": {
        "random": (89.02, 91.24), "dotprod": (93.03, 93.27), "gpuclustering": (93.52, 93.79),
        "gpupacking": (93.46, 93.72), "bestfit": (93.56, 93.79), "fgd": (95.00, 95.21),
    },
    "cpu100": {
        "random": (87.44, 89.11), "dotprod": (91.73, 91.96), "gpuclustering": (92.42, 92.64),
        "gpupacking": (92.49, 92.72), "bestfit": (93.26, 93.44), "fgd": (95.21, 95.35),
    },
}  # fmt: skip


def jct_lines(find: Callable[[str, str], Path]) -> Iterator[tuple[str, bool]]:
    for trace, of_policy in JCT.items():
        for policy, given in of_policy.items():
            path = find(f"muri/{trace}.csv", "muri")
            result = jobs_result(run_jobs(path, "muri", policy, 8, 8, "known", None))
            own = [float(str(result[key])) / 1000 for key in ("avg_jct_s", "p99_jct_s", "makespan_s")]
            off = max(abs(mine - theirs) / theirs for mine, theirs in zip(own, given, strict=True))
            text = f"{trace} {policy}: {' / '.join(f'{value:.0f}' for value in own)}, given {given}, {100 * off:.2f} %"
            yield text, off <= JCT_PART


def openb_lines(find: Callable[[str, str], Path], seeds: int) -> Iterator[tuple[str, bool]]:
    for workload, of_policy in ALLOCATION.items():
        for policy, given in of_policy.items():
            pods = find(f"openb/openb_pod_list_{workload}.csv", "openb")
            runs = [run_published_fill(find(NODES, "openb"), pods, policy, run) for run in range(seeds)]
            own = [statistics.fmean(run[at] for run in runs) for at in range(len(given))]
            off = max(abs(mine - theirs) for mine, theirs in zip(own, given, strict=True))
            text = f"{workload} {policy}: {own[0]:.2f} / {own[1]:.2f}, published {given}, {off:.2f} points"
            # Half a hundredth more: the published value is itself rounded.
            yield text, off <= (POINTS_BY_CHANCE if policy == "random" else POINTS) + 0.005


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--what", choices=("jct", "openb", "all"), default="all")
    parser.add_argument("--seeds", type=int, choices=range(1, RUNS + 1), default=RUNS, metavar="N")
    options = parser.parse_args()
    missed: list[str] = []

    def measure(find: Callable[[str, str], Path]) -> dict[str, object]:
        checked = 0
        parts = [jct_lines(find)] if options.what in ("jct", "all") else []
        if options.what in ("openb", "all"):
            parts.append(openb_lines(find, options.seeds))
        for part in parts:
            for text, holds in part:
                checked += 1
                if not options.json:
                    print(("ok    " if holds else "OFF   ") + text, flush=True)
                if not holds:
                    missed.append(text)
        return {"checked": checked, "off": len(missed)}

    answer(options, measure)
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
