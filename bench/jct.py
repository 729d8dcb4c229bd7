"""Run a trace of jobs through a simulated cluster: completion times, waits, preemptions, fairness of a policy.

python -m bench.jct --trace muri/trace1.csv --format muri --durations known --restart-s model --policy gpuyard --json
"""

from __future__ import annotations

import argparse

from bench.sim_options import answer, parser_of
from gpuyard_daemon.sim.experiments import JOB_POLICIES, jobs_result, run_jobs
from gpuyard_daemon.sim.trace_jobs import JOB_FORMATS


def _restart(text: str) -> float | None:
    if text == "model":
        return None
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("expected seconds or 'model'")
    return seconds


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--trace", required=True, metavar="FILE")
    parser.add_argument("--format", choices=JOB_FORMATS, default="gpuyard")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--durations", choices=("known", "estimated", "unknown"), default="known")
    parser.add_argument("--restart-s", type=_restart, default=30.0, metavar="SECONDS|model")
    parser.add_argument("--policy", choices=JOB_POLICIES, default="gpuyard")
    parser.add_argument("--more", action="store_true", help="further figures: small jobs, restarts, allocation")
    options = parser.parse_args()
    answer(
        options,
        lambda find: jobs_result(
            run_jobs(
                find(options.trace, options.format), options.format, options.policy, options.nodes,
                options.gpus_per_node, options.durations, options.restart_s, options.seed_base,
            ),
            more=options.more,
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
