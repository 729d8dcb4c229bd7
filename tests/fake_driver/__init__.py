"""A stand-in for NVIDIA's driver, for tests on machines without a GPU.

It replaces what the agent meets from outside and nothing inside it: `libnvidia-ml.so.1` (C, loaded by the real pynvml),
`libcuda.so.1` (the checkpoint calls, and what a small program needs), `nvidia-cuda-mps-control`, `nvidia-smi
compute-policy`, and `fake-cuda`, a program that behaves like a CUDA job. All of them share one state file, so agent,
jobs and test see the same cards.

`control.FakeDriver` makes one and turns its knobs; `python -m fake_driver` does the same over JSON lines.
What it does not know: how fast real hardware is, and any rule of NVIDIA's that is not published.
"""
