"""The fake driver's knobs over JSON lines, for whatever does not speak Python: `python -m fake_driver FOLDER`.

One request per line, such as `{"do": "create", "model": "A30-24GB", "count": 2}`,
`{"do": "alloc", "pid": 4711, "gpu": 0, "mib": 512}`, `{"do": "xid", "gpu": 0, "number": 79}`; one answer per line:
`{"ok": true, "result": …}` or `{"ok": false, "error": …}`. Requests are the methods of control.FakeDriver and of its
cards under their own names; `gpu` says which card (0 if left out).
"""

from __future__ import annotations

import json
import sys
from typing import Any

from fake_driver.control import CheckpointRefused, DriverRefused, FakeDriver, Request

_OF_CARD = ("xid", "ecc", "lose", "restore", "remove", "add", "reset", "set", "get", "facts", "allocate", "free")
_OF_DRIVER = (
    "release",
    "load",
    "inject",
    "hang",
    "clear_faults",
    "calls",
    "reboot",
    "describe",
    "processes",
    "find",
    "set_knob",
    "get_knob",
    "set_driver_version",
    "set_link",
    "checkpoint",
    "checkpoint_state",
)
_SHORT = {"alloc": "allocate"}


def carry_out(root: str, request: dict[str, Any]) -> dict[str, Any]:
    """One request's answer."""
    words = dict(request)
    name = str(words.pop("do", ""))
    name = _SHORT.get(name, name)
    try:
        if name == "create":
            driver = FakeDriver.create(root, **words)
            return {"ok": True, "result": [gpu.uuid for gpu in driver.gpus]}
        driver = FakeDriver.open(root)
        try:
            if name == "checkpoint":
                words["request"] = Request[str(words["request"]).upper()]
            if name in _OF_CARD:
                result = getattr(driver.gpu(words.pop("gpu", 0)), name)(**words)
            elif name in _OF_DRIVER:
                result = getattr(driver, name)(**words)
            else:
                known = ", ".join(sorted({"create", *_SHORT, *_OF_CARD, *_OF_DRIVER}))
                return {"ok": False, "error": f"{name!r} is no request; expected one of {known}"}
        finally:
            driver.close()
    except (DriverRefused, CheckpointRefused) as refusal:
        return {"ok": False, "error": str(refusal), "code": refusal.code}
    except (OSError, TypeError, KeyError, ValueError) as problem:
        return {"ok": False, "error": f"{type(problem).__name__}: {problem}"}
    return {"ok": True, "result": result}


def main(arguments: list[str]) -> int:
    """Until the end of the input."""
    if len(arguments) != 1:
        print("usage: python -m fake_driver FOLDER < requests", file=sys.stderr)
        return 2
    for line in sys.stdin:
        if line.strip():
            print(json.dumps(carry_out(arguments[0], json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
