"""A PyTorch program that holds memory on a card and multiplies matrices on it.

python torch_program.py MIB           one JSON line a round, as cuda_program.py says it
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any, NoReturn

MIB = 2**20
SIDE = 2048
STEPS_A_ROUND = 20


def main() -> NoReturn:
    torch: Any = importlib.import_module("torch")
    held = torch.ones(int(sys.argv[1]) * MIB // 4, dtype=torch.float32, device="cuda")
    matrix = torch.eye(SIDE, device="cuda")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rounds = 0
    while True:
        for _ in range(STEPS_A_ROUND):
            matrix = matrix @ torch.eye(SIDE, device="cuda")
        # What it held is still what it was.
        if float(held[:: held.numel() // 1024].sum()) < 1024 or float(matrix.sum()) != SIDE:
            raise SystemExit("its memory has changed")
        rounds += 1
        print(json.dumps({"rounds": rounds, "sms": sms} if rounds == 1 else {"rounds": rounds}), flush=True)


if __name__ == "__main__":
    main()
