"""Partitions of cards: made, checked and undone.

`base.PartitionMaker` is the interface, `maker.CardPartitions(backend, run_dir)` the one implementation for every
backend: it keeps the books in `room.CardLedger` and leaves the making to one module per mode.
"""
