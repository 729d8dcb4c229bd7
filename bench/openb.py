"""Fill a cluster with pods, nothing departing: GPU allocation, fragmentation and speed of a placement policy.

python -m bench.openb --nodes FILE --pods FILE --policy gpuyard --seeds 10 [--batch K] --json
"""

from __future__ import annotations

from bench.sim_options import add_openb, answer, parser_of
from gpuyard_daemon.sim.experiments import run_fill
from gpuyard_daemon.sim.placing import PLACEMENT_POLICIES


def main() -> None:
    parser = parser_of(__doc__)
    add_openb(parser)
    parser.add_argument("--policy", choices=PLACEMENT_POLICIES, default="gpuyard")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1, metavar="K", help="place K consecutive pods as one round")
    options = parser.parse_args()
    answer(
        options,
        lambda find: run_fill(
            find(options.nodes, "openb"), find(options.pods, "openb"), options.policy, options.seeds,
            options.seed_base, options.batch,
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
