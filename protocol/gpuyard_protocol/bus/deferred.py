"""Modules that a library imports and we may never use: their code runs when somebody first looks into them.

nats-py imports an HTTP client for the case that a yard is reached over a websocket. Reading it took almost half of the
time that a command spent on starting. A deferred module stands in `sys.modules` under its own name, as what it is, but
unread: the first look at anything in it reads it. (The standard library's lazy loader does not help here: a second
`import` of the module is a look at it.)
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def defer(name: str) -> None:
    """Make a module be read at its first use; nothing happens if it is loaded already or is not there at all."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    lock, is_read = threading.RLock(), False

    def read(attribute: str) -> Any:
        nonlocal is_read
        with lock:  # who comes while it is being read waits; reading itself looks at what there is so far
            if not is_read:
                is_read = True
                loader.exec_module(module)
                if vars(module).get("__getattr__") is read:
                    del vars(module)["__getattr__"]
                return getattr(module, attribute)
        try:
            return vars(module)[attribute]
        except KeyError:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}") from None

    vars(module)["__getattr__"] = read
    sys.modules[name] = module


@contextmanager
def absent(name: str) -> Iterator[None]:
    """Let what is imported within do without a module that it would use if it were there; one that is loaded stays."""
    if name in sys.modules:
        yield
        return
    # What the import system takes for a module that cannot be imported.
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
