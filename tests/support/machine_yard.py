"""A yard as docs/install.md puts it up, inside a machine of `support.nspawn`, and what tests ask of it there."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator

from support.nspawn import PREFIX, Machine, machine

DEADLINE_S = 30.0
NODE = "gpu-1"
UNITS = ("gpuyard-nats", "gpuyard-daemon", "gpuyard-agent")
CONTEXT = {"GPUYARD_CONTEXT": "/var/lib/gpuyard/clients/acme.alice/context.toml"}
AGENT_CONFIG = f"""
state = "/var/lib/gpuyard/agent"
node = "{NODE}"
key = "/etc/gpuyard/node.seed"
simulate = "2xA100-80GB"
http = ""
"""


@contextlib.contextmanager
def yard_inside(
    settings: str = "", *, prepare: Callable[[Machine], None] = lambda made: None, nesting: bool = False
) -> Iterator[Machine]:
    """A machine with a yard of one node. `settings`: more for its agent; `prepare`: what is to be there at boot."""
    with machine(nesting=nesting) as made:
        made.install_units()
        (made.etc / "gpuyard" / "agent.toml").write_text(AGENT_CONFIG + settings)
        prepare(made)
        made.start()
        made.run(
            *("systemd-run", "--quiet", "--wait", "--pipe", "--collect", "-p", "User=gpuyard"),
            *(f"{PREFIX}/bin/gpuyard", "init", "--state", "/var/lib/gpuyard", "--node", NODE, "--user", "acme/alice"),
        )
        shutil.copy(made.state / "keys" / f"node-{NODE}.seed", made.etc / "gpuyard" / "node.seed")
        made.systemctl("enable", "--quiet", *UNITS)
        made.systemctl("start", *UNITS)
        until(
            lambda: '"ready"' in made.run(f"{PREFIX}/bin/gpuyard", "nodes", "--json", env=CONTEXT).stdout, "it joined"
        )
        yield made


def until(condition: Callable[[], bool], what: str, within_s: float = DEADLINE_S) -> None:
    """Waits for something inside the machine that tells nobody outside when it happens."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.05)


def submit(yard: Machine, script: str, *options: str) -> int:
    command = (f"{PREFIX}/bin/gpuyard", "submit", "--parsable", "--cwd", "", *options, "--", "sh", "-c", script)
    return int(yard.run(*command, env=CONTEXT).stdout)


def state_of(yard: Machine, job: int) -> str:
    return yard.run(f"{PREFIX}/bin/gpuyard", "job", "show", str(job), env=CONTEXT).stdout


def output(yard: Machine, job: int, attempt: int = 1) -> str:
    path = yard.state / "agent" / "jobs" / str(job) / str(attempt) / "0.out"
    return path.read_text() if path.exists() else ""


def unit(job: int, attempt: int = 1) -> str:
    return f"gpuyard-{NODE}-{job}.{attempt}.0.service"


def running(yard: Machine, script: str, *options: str) -> tuple[int, int]:
    """A job that has said `ready`, and its main process."""
    job = submit(yard, f"echo ready; {script}", *options)
    until(lambda: "ready" in output(yard, job), f"job {job} runs")
    return job, int(yard.show(unit(job), "MainPID"))


def is_forgotten(yard: Machine, job: int) -> bool:
    """Its unit is gone: the agent has its end in the ledger."""
    return yard.show(unit(job), "LoadState") == "not-found"


def cancel(yard: Machine, *jobs: int) -> None:
    yard.run(f"{PREFIX}/bin/gpuyard", "cancel", *map(str, jobs), env=CONTEXT)
    until(lambda: all(is_forgotten(yard, job) for job in jobs), f"{jobs} have gone")
