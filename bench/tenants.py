"""Fairness under lasting overload: tenants of equal weight with jobs of unlike shapes, who all want more than there is.

    python -m bench.tenants --json [--load 1.6] [--days 3] [--policy gpuyard]

One floods the cluster with short jobs, one has long gangs, one arrays, one a mixture; each asks for the same GPU time.
`jain_24h` is the mean over days of Jain's index of what each got over what it could have used, `jain_entitled_24h` of
what each got over its equal part; `of_due`: that part by tenant and day. Nobody knows run times.
"""

from __future__ import annotations

import argparse
import json

from gpuyard_daemon.sim.experiments import JOB_POLICIES, run_equal_tenants
from gpuyard_daemon.sim.measures import fairness_measures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=JOB_POLICIES, default="gpuyard")
    parser.add_argument("--load", type=float, default=1.6)
    parser.add_argument("--days", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--restart-s", type=float, default=60.0)
    parser.add_argument("--seed-base", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    run = run_equal_tenants(
        options.policy, options.load, options.days, options.nodes, options.gpus_per_node, options.restart_s,
        options.seed_base,
    )  # fmt: skip
    result = fairness_measures(run)
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:18} {value}")


if __name__ == "__main__":
    main()
