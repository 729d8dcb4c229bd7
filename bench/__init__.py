"""Benchmarks: `python -m bench.<name> --json` prints one JSON object on standard output and exits 0.

They report, they never judge: tests assert behaviour, benchmarks measure time. Everything runs on real parts: a real
nats-server with `sync_interval: always`, the real daemon, real agents (with simulated cards) and real processes.
"""
