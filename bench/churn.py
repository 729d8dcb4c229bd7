"""Pods arrive and depart on a cluster kept near its load: GPU demand that has to wait for a place.

python -m bench.churn --policy gpuyard --load 0.97 [--preemption never] --json
"""

from __future__ import annotations

from bench.sim_options import add_openb, answer, parser_of
from gpuyard_daemon.sim.experiments import run_churn
from gpuyard_daemon.sim.placing import PLACEMENT_POLICIES


def main() -> None:
    parser = parser_of(__doc__)
    add_openb(parser)
    parser.add_argument("--policy", choices=PLACEMENT_POLICIES, default="gpuyard")
    parser.add_argument("--load", type=float, default=0.97)
    parser.add_argument(
        "--preemption",
        choices=("never", "checkpoint"),
        default="checkpoint",
        help="what the pods allow: nothing takes them off their hosts, or they may be moved and lose a minute",
    )
    options = parser.parse_args()
    answer(
        options,
        lambda find: run_churn(
            find(options.nodes, "openb"), find(options.pods, "openb"), options.policy, options.load,
            options.seed_base, options.preemption,
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
