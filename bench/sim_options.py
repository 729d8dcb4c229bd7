"""What the simulator's benchmarks share: files given by path or below the folder of traces, and one answer out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from gpuyard_daemon.sim.trace_files import TraceError, locate

NODES = "openb/openb_node_list_gpu_node.csv"
PODS = "openb/openb_pod_list_default.csv"


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", metavar="DIR", help="folder of public traces (default: $GPUYARD_TRACES)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--seed-base", type=int, default=0)
    return parser


def add_openb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", default=NODES, metavar="FILE")
    parser.add_argument("--pods", default=PODS, metavar="FILE")


def answer(options: argparse.Namespace, measure: Callable[[Callable[[str, str], Path]], dict[str, object]]) -> None:
    """Print what `measure` returns; it is given a function that finds a file by text and source."""
    try:
        result = measure(lambda text, source: locate(text, source, options.traces))
    except TraceError as problem:
        print(problem, file=sys.stderr)
        raise SystemExit(2) from None
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:22} {value}")
