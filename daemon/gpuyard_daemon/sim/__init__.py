"""The simulated world: traces, simulated clusters, policies to compare with, and the measures to compare by.

It decides nothing that production does not: policy `gpuyard` calls the modules of the core. Nothing in the daemon
imports this package except the command line.
"""
