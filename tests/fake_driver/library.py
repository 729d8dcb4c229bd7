"""The C library's control functions, with their types, and the numbers that go over that border.

Errors, flags and states are those of NVML and CUDA; control.py turns them into methods.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from typing import Any

#: GI and CI ids where there is none.
NO_INSTANCE = 0xFFFFFFFF
MIB = 1 << 20
#: No timeout.
FOREVER = (1 << 64) - 1


class Error(enum.IntEnum):
    """NVML's codes, for `inject` and as what control calls fail with."""

    INVALID_ARGUMENT = 2
    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    NOT_FOUND = 6
    DRIVER_NOT_LOADED = 9
    TIMEOUT = 10
    FUNCTION_NOT_FOUND = 13
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    LIB_RM_VERSION_MISMATCH = 18
    IN_USE = 19
    MEMORY = 20
    INSUFFICIENT_RESOURCES = 23
    UNKNOWN = 999


class Flag(enum.IntFlag):
    """What a process is to the driver."""

    MPS_CLIENT = 1
    MPS_SERVER = 2
    GRAPHICS = 4
    #: Holds managed memory or IPC handles: cannot be checkpointed.
    UNSUSPENDABLE = 8


class Checkpoint(enum.IntEnum):
    """State of a process as `cuCheckpointProcessGetState` tells it."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3


class Request(enum.IntEnum):
    """What can be asked of a process."""

    LOCK = 1
    CHECKPOINT = 2
    RESTORE = 3
    UNLOCK = 4


class Change(enum.IntEnum):
    """What happens to a card from outside."""

    LOSE = 0
    RESTORE = 1
    REMOVE = 2
    ADD = 3
    RESET = 4
    REBOOT = 5


#: Bits of an event mask.
EVENT_ECC_SINGLE = 0x1
EVENT_ECC_DOUBLE = 0x2
EVENT_XID = 0x8


class DriverRefused(Exception):
    """A control call was refused, with NVML's code."""

    def __init__(self, doing: str, code: int) -> None:
        self.code = code
        name = Error(code).name if code in Error._value2member_map_ else str(code)
        super().__init__(f"{doing}: {name}")


class CheckpointRefused(Exception):
    """A checkpoint call was refused, with CUDA's code.

    1 no such process, 2 out of memory, 401 wrong state, 600 not ready in time, 801 no process that can be checkpointed.
    """

    def __init__(self, request: Request, code: int) -> None:
        self.code = code
        super().__init__(f"{request.name}: CUDA error {code}")


_u32, _u64, _i64, _int, _text, _out32 = (
    ctypes.c_uint32,
    ctypes.c_uint64,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
)
_state = ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "create": (_int, (_text, _u64)),
    "open": (_state, (_text,)),
    "close": (None, (_state,)),
    "add_gpu": (_int, (_state, _text)),
    "link": (_int, (_state, _u32, _u32, _u32, _u32, _u32)),
    "set": (_int, (_state, _int, _text, _i64)),
    "get": (_int, (_state, _int, _text, ctypes.POINTER(_i64))),
    "set_driver_version": (_int, (_state, _text, _text)),
    "find": (_int, (_state, _text, _out32, _out32, _out32)),
    "alloc": (_int, (_state, _u32, _u32, _u32, _u32, _u64, _u32)),
    "free": (_int, (_state, _u32, _u32, _u32, _u32, _u64)),
    "release": (_int, (_state, _u32)),
    "load": (_int, (_state, _u32, _u32, _u32, _u64)),
    "event": (_int, (_state, _u32, _u64, _u64, _u32, _u32)),
    "change": (_int, (_state, _int, _int)),
    "inject": (_int, (_state, _text, _int, _int, _u64, _int, _int)),
    "clear_faults": (_int, (_state, _text)),
    "take_fault": (_int, (_state, _text)),
    "calls": (_u64, (_state, _text)),
    "checkpoint": (_int, (_state, _u32, _int, _u64)),
    "checkpoint_state": (_int, (_state, _u32, _out32)),
    "checkpoint_next": (_int, (_state, _u64)),
    "checkpoint_done": (_int, (_state,)),
    "describe": (_u64, (_state, _text, _u64)),
    "die_holding_the_lock": (None, (_state,)),
}


@functools.cache
def load_library(path: str) -> Any:
    """The control functions of a built library, with their types."""
    library = ctypes.CDLL(path, use_errno=True)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, f"fakenvml_{name}")
        function.restype, function.argtypes = result, arguments
    return library
