"""Makes a fake driver and turns its knobs.

`FakeDriver.create(folder, "H100-80GB", 8)` lays out a folder like an installed driver: `lib/` with the libraries,
`bin/` with the programs, `state` with the cards. `env()` is what a process needs to meet it; the libraries and programs
also find their state without any environment, because jobs are started with a clean one.

Every call goes to the C library's control functions, so what it says is what pynvml in another process sees at once.
It knows nothing of pytest or of the agent. Numbers of NVML and CUDA errors are those of the real ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from fake_driver.library import (
    EVENT_ECC_DOUBLE,
    EVENT_ECC_SINGLE,
    EVENT_XID,
    FOREVER,
    MIB,
    NO_INSTANCE,
    Change,
    Checkpoint,
    CheckpointRefused,
    DriverRefused,
    Error,
    Flag,
    Request,
    load_library,
)

__all__ = [
    "EVENT_ECC_DOUBLE",
    "EVENT_ECC_SINGLE",
    "EVENT_XID",
    "MIB",
    "NO_INSTANCE",
    "Checkpoint",
    "CheckpointRefused",
    "DriverRefused",
    "Error",
    "FakeDriver",
    "FakeGpu",
    "Flag",
    "Request",
]


class FakeGpu:
    """One card of a fake driver."""

    def __init__(self, driver: FakeDriver, index: int) -> None:
        self._driver = driver
        self.index = index
        facts = driver.describe()["gpus"][index]
        self.uuid: str = facts["uuid"]
        self.model: str = facts["model"]
        self.pci_bus_id: str = facts["pci_bus_id"]

    def set(self, **knobs: int) -> None:
        """Sets knobs by the names of `struct gpu` in nvml/state.h, such as `temperature_c=91`, `mig_clients=1`."""
        for name, value in knobs.items():
            self._driver.set_knob(name, value, gpu=self.index)

    def get(self, name: str) -> int:
        """A knob's value."""
        return self._driver.get_knob(name, gpu=self.index)

    def facts(self) -> dict[str, Any]:
        """The card now: mode, memory, MIG instances."""
        card: dict[str, Any] = self._driver.describe()["gpus"][self.index]
        return card

    def lose(self, *, xid: int | None = 79) -> None:
        """Falls off the bus; `xid` is reported first (None: silently)."""
        if xid is not None:
            self.xid(xid)
        self._driver.change(Change.LOSE, self.index)

    def restore(self) -> None:
        """Is back, after a reset: nothing of what was on it is left, and handles from before are stale."""
        self._driver.change(Change.RESTORE, self.index)

    def remove(self) -> None:
        """Is unbound from the driver: the next session does not list it."""
        self._driver.change(Change.REMOVE, self.index)

    def add(self) -> None:
        """Is bound to the driver again."""
        self._driver.change(Change.ADD, self.index)

    def reset(self) -> None:
        """`nvidia-smi --gpu-reset`: processes and instances are gone, a pending MIG mode takes effect."""
        self._driver.change(Change.RESET, self.index)

    def xid(self, number: int, *, gi: int = NO_INSTANCE, ci: int = NO_INSTANCE) -> None:
        """Reports an Xid to whoever waits for one."""
        self._driver.post_event(self.index, EVENT_XID, number, gi=gi, ci=ci)

    def ecc(self, *, corrected: int = 0, uncorrected: int = 0) -> None:
        """Counts memory errors, and reports them."""
        for kind, count, event in (
            ("corrected", corrected, EVENT_ECC_SINGLE),
            ("uncorrected", uncorrected, EVENT_ECC_DOUBLE),
        ):
            if count:
                for counter in ("volatile", "aggregate"):
                    name = f"ecc_{kind}_{counter}"
                    self.set(**{name: self.get(name) + count})
                self._driver.post_event(self.index, event, count)

    def allocate(
        self, pid: int, mib: int, *, gi: int = NO_INSTANCE, ci: int = NO_INSTANCE, flags: Flag | int = 0
    ) -> None:
        """A live process takes memory here. Raises `DriverRefused`: MEMORY, IN_USE (exclusive mode), NOT_SUPPORTED (MIG
        mode), NOT_FOUND (no such instance), GPU_IS_LOST."""
        self._driver.allocate(pid, self.index, gi, ci, mib * MIB, int(flags))

    def free(self, pid: int, mib: int, *, gi: int = NO_INSTANCE, ci: int = NO_INSTANCE) -> None:
        """It gives some back."""
        self._driver.free(pid, self.index, gi, ci, mib * MIB)


class FakeDriver:
    """One fake driver: a folder with libraries, programs and state."""

    def __init__(self, root: str, library: str) -> None:
        self.root = root
        self._library = load_library(library)
        #: What pynvml is to load.
        self.library = library
        self.state = os.path.join(root, "state")
        self._opened: int | None = self._open(self.state)

    def _open(self, state: str) -> int:
        handle: int | None = self._library.fakenvml_open(os.fsencode(state))
        if handle is None:
            problem = ctypes.get_errno()
            raise OSError(problem, os.strerror(problem), state)
        return handle

    @classmethod
    def create(
        cls,
        root: str | os.PathLike[str],
        model: str | Sequence[str] = "H100-80GB",
        count: int = 1,
        *,
        topology: str | None = None,
        numa_nodes: int = 1,
        seed: int | None = None,
        without: tuple[str, ...] = (),
        **knobs: int,
    ) -> FakeDriver:
        """Makes one in the folder `root`.

        `model`: a name of geometry.toml, or one per card. `topology`: "none", "nvswitch", "mesh", "pairs"; None takes
        NVSwitch where the model has links and there is more than one card. `seed` fixes UUIDs. `without`: symbols that
        the library lacks, as an older driver. `knobs`: of the whole driver (`privileged=0`, `cuda_version=12040` …).
        """
        # Programs that only open a driver start faster without these.
        from fake_driver import build, install

        built = build.build(without=without)
        place = os.path.abspath(os.fspath(root))
        install.install(place, os.fspath(built.nvml), os.fspath(built.cuda))
        library = load_library(os.fspath(built.nvml))
        state = os.path.join(place, "state")
        problem = library.fakenvml_create(
            os.fsencode(state), int.from_bytes(os.urandom(7), "big") if seed is None else seed
        )
        if problem:
            raise OSError(problem, os.strerror(problem), state)
        driver = cls(place, os.fspath(built.nvml))
        models = [model] * count if isinstance(model, str) else list(model)
        for index, name in enumerate(models):
            driver._check(f"add a card {name}", library.fakenvml_add_gpu(driver._handle, name.encode()))
            driver.set_knob("numa_node", index * numa_nodes // len(models), gpu=index)
        driver._wire(topology, models)
        for name, value in knobs.items():
            driver.set_knob(name, value)
        return driver

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> FakeDriver:
        """The one that `create` made in this folder, also from another process."""
        place = os.path.abspath(os.fspath(root))
        return cls(place, os.path.join(place, "lib", "libnvidia-ml.so.1"))

    @classmethod
    def here(cls) -> FakeDriver | None:
        """The one that this process was started under (see `env` and the programs in `bin/`), if any."""
        state, library = os.environ.get("FAKENVML_STATE"), os.environ.get("FAKENVML_LIBRARY")
        if not state or not library or not os.path.exists(state):
            return None
        return cls(os.path.dirname(state), library)

    def close(self) -> None:
        """Lets go of the state; the folder stays."""
        self._library.fakenvml_close(self._handle)
        self._opened = None

    @property
    def _handle(self) -> int:
        """The C library follows it: one that is closed would end the interpreter."""
        if self._opened is None:
            raise ValueError(f"the fake driver in {self.root} is closed")
        return self._opened

    @property
    def bin(self) -> str:
        """Folder of nvidia-cuda-mps-control, nvidia-smi and fake-cuda."""
        return os.path.join(self.root, "bin")

    def program(self, name: str) -> str:
        """Path of one of them."""
        return os.path.join(self.bin, name)

    def env(self, **more: str) -> dict[str, str]:
        """This process's environment, changed so that a child meets the fake driver."""
        library_path = os.path.join(self.root, "lib")
        return {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (library_path, os.environ.get("LD_LIBRARY_PATH")))),
            "PATH": os.pathsep.join((self.bin, os.environ.get("PATH", os.defpath))),
            "FAKENVML_STATE": self.state,
            "FAKENVML_LIBRARY": self.library,
            **more,
        }

    @contextlib.contextmanager
    def in_process(self, module: ModuleType) -> Iterator[Any]:
        """While it lasts, `module` (the real pynvml, or a copy of it) talks to this driver in this process.

        pynvml keeps the library and every function pointer for the process's life; both are set back on the way out.
        """
        names = ("nvmlLib", "_nvmlGetFunctionPointer_cache", "_nvmlLib_refcount")
        before = {name: vars(module)[name] for name in names}
        state = os.environ.get("FAKENVML_STATE")
        os.environ["FAKENVML_STATE"] = self.state
        # A fresh CDLL object: its functions keep no types from the control side or from another driver.
        for name, value in zip(names, (ctypes.CDLL(self.library), {}, 0), strict=True):
            setattr(module, name, value)
        try:
            yield module
        finally:
            for _ in range(vars(module)["_nvmlLib_refcount"]):
                module.nvmlShutdown()
            for name, value in before.items():
                setattr(module, name, value)
            if state is None:
                os.environ.pop("FAKENVML_STATE", None)
            else:
                os.environ["FAKENVML_STATE"] = state

    @property
    def gpus(self) -> tuple[FakeGpu, ...]:
        """Every card, also lost and removed ones."""
        return tuple(FakeGpu(self, index) for index in range(len(self.describe()["gpus"])))

    def gpu(self, index: int = 0) -> FakeGpu:
        """One card."""
        return FakeGpu(self, index)

    def describe(self) -> dict[str, Any]:
        """The whole state."""
        needed = self._library.fakenvml_describe(self._handle, None, 0)
        while True:
            buffer = ctypes.create_string_buffer(needed + 1)
            now = self._library.fakenvml_describe(self._handle, buffer, needed + 1)
            if now <= needed:
                facts: dict[str, Any] = json.loads(buffer.value)
                return facts
            needed = now

    def processes(self) -> list[dict[str, Any]]:
        """Live processes that hold memory on a card."""
        found: list[dict[str, Any]] = self.describe()["processes"]
        return found

    def set_knob(self, name: str, value: int, *, gpu: int = -1) -> None:
        """Sets a knob of the driver or of one card; the names are fields of nvml/state.h."""
        self._check(f"knob {name}", self._library.fakenvml_set(self._handle, gpu, name.encode(), value))

    def get_knob(self, name: str, *, gpu: int = -1) -> int:
        """A knob's value."""
        value = ctypes.c_int64()
        self._check(f"knob {name}", self._library.fakenvml_get(self._handle, gpu, name.encode(), ctypes.byref(value)))
        return value.value

    def set_driver_version(self, driver: str, nvml: str | None = None) -> None:
        """What the driver says it is."""
        self._library.fakenvml_set_driver_version(self._handle, driver.encode(), (nvml or f"13.{driver}").encode())

    def inject(
        self,
        symbol: str,
        *,
        error: Error | int = 0,
        delay_s: float = 0,
        times: int | None = None,
        after: int = 0,
        gpu: int = -1,
    ) -> None:
        """From its next call on, `symbol` first takes `delay_s`, then fails with `error`.

        `after` calls pass first; then `times` are hit (None: all, until `clear_faults`). `gpu`: only calls about that
        card. A `symbol` ending in `*` means every one that begins so. Beside NVML's names: `cuCheckpointProcess…`
        (errors are CUDA's), `mps:start`, `mps:<command>`, `mps:client-killed` and `nvidia-smi` (see mps_control.py).
        """
        microseconds = round(delay_s * 1e6)
        hits = -1 if times is None else times
        self._check(
            f"inject {symbol}",
            self._library.fakenvml_inject(self._handle, symbol.encode(), gpu, int(error), microseconds, after, hits),
        )

    def hang(self, symbol: str, *, after: int = 0, gpu: int = -1) -> None:
        """From its next call on, `symbol` does not return, until `clear_faults`."""
        self.inject(symbol, delay_s=1e9, after=after, gpu=gpu)

    def clear_faults(self, symbol: str | None = None) -> None:
        """Takes back injections (of one symbol as it was written); calls that hang go on."""
        self._library.fakenvml_clear_faults(self._handle, symbol.encode() if symbol is not None else None)

    def take_fault(self, symbol: str) -> int:
        """For stand-ins: sleeps what was injected for the symbol, and gives its error (0: none)."""
        code: int = self._library.fakenvml_take_fault(self._handle, symbol.encode())
        return code

    def calls(self, symbol: str) -> int:
        """How often it was called, by every process together. `nvmlInit` counts sessions, not nested calls."""
        count: int = self._library.fakenvml_calls(self._handle, symbol.encode())
        return count

    def reboot(self) -> None:
        """What a reboot of the host does to the cards. Processes that run on are forgotten."""
        self.change(Change.REBOOT, -1)

    def find(self, uuid: str) -> tuple[int, int, int]:
        """(card, GI, CI) of a card's or MIG device's UUID; the latter two `NO_INSTANCE` for a card."""
        gpu, gi, ci = ctypes.c_uint32(), ctypes.c_uint32(), ctypes.c_uint32()
        code = self._library.fakenvml_find(
            self._handle, uuid.encode(), ctypes.byref(gpu), ctypes.byref(gi), ctypes.byref(ci)
        )
        self._check(f"find {uuid}", code)
        return gpu.value, gi.value, ci.value

    def allocate(self, pid: int, gpu: int, gi: int, ci: int, size: int, flags: int = 0) -> None:
        """A live process takes `size` bytes; see `FakeGpu.allocate`."""
        self._check("allocate", self._library.fakenvml_alloc(self._handle, pid, gpu, gi, ci, size, flags))

    def free(self, pid: int, gpu: int, gi: int, ci: int, size: int) -> None:
        """It gives `size` bytes back."""
        self._check("free", self._library.fakenvml_free(self._handle, pid, gpu, gi, ci, size))

    def release(self, pid: int) -> None:
        """The process has closed the driver: all of its memory is free."""
        self._library.fakenvml_release(self._handle, pid)

    def load(self, pid: int, sm_pct: int, memory_pct: int = 0, *, lasting_s: float | None = None) -> None:
        """The process keeps its cards so busy, for so long (None: until told otherwise)."""
        lasting = 0 if lasting_s is None else max(1, round(lasting_s * 1e6))
        self._check("load", self._library.fakenvml_load(self._handle, pid, sm_pct, memory_pct, lasting))

    def post_event(self, gpu: int, kind: int, data: int, *, gi: int = NO_INSTANCE, ci: int = NO_INSTANCE) -> None:
        """Raises an event on a card, for every registered waiter in every process."""
        self._check("event", self._library.fakenvml_event(self._handle, gpu, kind, data, gi, ci))

    def change(self, change: int, gpu: int) -> None:
        """What happens to a card from outside; the methods of `FakeGpu` name each."""
        self._check("change", self._library.fakenvml_change(self._handle, gpu, change))

    def checkpoint(self, pid: int, request: Request, *, timeout_s: float | None = None) -> None:
        """Asks a process as libcuda does. Raises `CheckpointRefused`."""
        limit = FOREVER if timeout_s is None else round(timeout_s * 1e6)
        code = self._library.fakenvml_checkpoint(self._handle, pid, int(request), limit)
        if code:
            raise CheckpointRefused(request, code)

    def checkpoint_state(self, pid: int) -> Checkpoint | None:
        """None: no process with anything on a card."""
        state = ctypes.c_uint32()
        code = self._library.fakenvml_checkpoint_state(self._handle, pid, ctypes.byref(state))
        return None if code else Checkpoint(state.value)

    def next_request(self, timeout_s: float) -> Request | None:
        """In a job: what it is asked to do next. From the first call on, its requests wait for its answers."""
        request: int = self._library.fakenvml_checkpoint_next(self._handle, round(timeout_s * 1e6))
        return Request(request) if request else None

    def answer_request(self) -> bool:
        """In a job: the request is carried out. False: nobody waits for it any more."""
        return bool(self._library.fakenvml_checkpoint_done(self._handle))

    def die_holding_the_lock(self) -> None:
        """Kills this process at the worst moment."""
        self._library.fakenvml_die_holding_the_lock(self._handle)

    def set_link(self, gpu: int, link: int, *, active: bool, remote_kind: int = 0, remote: int = 0) -> None:
        """One NVLink. `remote_kind`: 0 a card, 2 a switch, 255 unknown."""
        self._check("link", self._library.fakenvml_link(self._handle, gpu, link, active, remote_kind, remote))

    def _wire(self, topology: str | None, models: list[str]) -> None:
        from fake_driver import geometry

        count = len(models)
        for gpu, name in enumerate(models):
            links = geometry.models()[name].links
            kind = topology or ("nvswitch" if links and count > 1 else "none")
            for link in range(links):
                remote = _peer(kind, gpu, link, links, count)
                if kind == "nvswitch":
                    self.set_link(gpu, link, active=True, remote_kind=2)
                elif remote is not None:
                    self.set_link(gpu, link, active=True, remote=remote)

    @staticmethod
    def _check(doing: str, code: int) -> None:
        if code:
            raise DriverRefused(doing, code)


def _peer(kind: str, gpu: int, link: int, links: int, count: int) -> int | None:
    """Which card a link leads to where there is no switch."""
    if kind in ("none", "nvswitch"):
        return None
    if kind == "pairs":
        other = gpu ^ 1
        return other if other < count else None
    if kind == "mesh":
        peers = [other for other in range(count) if other != gpu]
        each = links // len(peers) if peers else 0
        return peers[link // each] if each and link < each * len(peers) else None
    raise ValueError(f"{kind!r} is no topology; expected none, nvswitch, mesh or pairs")
