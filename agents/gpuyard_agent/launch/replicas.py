"""The supervisor's table of processes: start, watch, stop, tell how it ended.

A replica goes running → clearing → ended. Clearing begins when its main process has ended: what is left of its group
is killed while the main process is still a zombie, so that its number cannot mean anybody else; then whatever of its
tree had left the group. Those processes come to us, since we are their subreaper, and are known by the mark in their
environment or by their session. A process that got rid of both is counted to the only replica of its uid, or is killed
when nothing runs that could own it. Only then is the end recorded and told.

Processes that an earlier supervisor started and that still run are adopted. They are not our children: a pidfd tells
that they have ended, on Linux 6.15 and later also how; on older kernels the end is told as `lost`. Their strays go to
init and are found by searching /proc for the mark.

Where control groups can be made (`cgroups`), each replica has one, and whatever is in it belongs to the tree, marked or
not: it is killed at once and as a whole, and frozen the same way. Without them a frozen replica is a halted group.

No sockets here, and no loop: `reap` is called on SIGCHLD, `tick` when `next_deadline` has come.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

import msgspec

from gpuyard_agent.launch import kernel
from gpuyard_agent.launch.base import ProcessExit, ProcessSpec, ProcessState, Refused, Started, StartResult
from gpuyard_agent.launch.cgroups import Cgroups
from gpuyard_agent.launch.job_files import StartRefused
from gpuyard_agent.launch.leases import LOOK_S, Lease, Leases, boot_clock_ms
from gpuyard_agent.launch.records import Ending, Forgotten, Intent, Records, Refusal, Remembered, Renewed, Running
from gpuyard_agent.launch.spawn import MARK, spawn
from gpuyard_protocol.names import AssignmentKey

#: A tree that has not died this long after SIGKILL sits in the kernel (a hung driver or file server): its end is told
#: nevertheless, with the pids.
CLEAR_S = 10.0
#: Time between two looks at trees that clear, where nothing tells when to look.
_LOOK_S = 0.02
#: A process in the middle of an exec shows no environment for an instant. One that shows none for so long has none.
_DOUBT_S = 0.05

Log = Callable[[str, str], None]


class Replica(msgspec.Struct, kw_only=True):
    """One start."""

    key: AssignmentKey
    pid: int
    #: Clock ticks since boot; with `pid`, the process's name within this boot.
    start_time: int
    #: Wall time of the start.
    at_ms: int
    uid: int
    #: Of an adopted main process that still runs; -1 for our own children.
    pidfd: int = -1
    #: Started by an earlier supervisor.
    adopted: bool = False
    #: A stop was asked.
    stopping: bool = False
    #: When the group is killed, on the monotonic clock; None: not.
    kill_at: float | None = None
    #: How the main process ended, set while the rest of the tree is cleared.
    ending: ProcessExit | None = None
    #: When clearing is given up, on the monotonic clock. Set with `ending`.
    clear_until: float = 0.0
    #: Since when nothing of an adopted tree is found any more; a single look can miss a process in its exec.
    quiet_since: float | None = None
    #: The same as `ending` once it is recorded and told; the replica is then over.
    exit: ProcessExit | None = None


class Replicas:
    """All starts that are not forgotten."""

    def __init__(self, records: Records, log: Log, cgroups: Cgroups) -> None:
        self._records = records
        self._cgroups = cgroups
        self._leases = Leases(records.remembered.renewed_ms if records.same_boot else 0)
        #: Replicas that are halted by `freeze`.
        self._frozen: set[AssignmentKey] = set()
        self._log = log
        self._replicas: dict[AssignmentKey, Replica] = {}
        #: Main processes that are our children and not reaped, by pid.
        self._mains: dict[int, Replica] = {}
        #: Replicas whose `ending` is set and `exit` is not.
        self._clearing: dict[AssignmentKey, Replica] = {}
        #: Replicas with a `kill_at`.
        self._stopping: dict[AssignmentKey, Replica] = {}
        #: Owners of strays among our children, as found.
        self._strays: dict[int, AssignmentKey] = {}
        #: Children without any environment, since when they were seen so.
        self._doubts: dict[int, float] = {}
        #: Ends not yet fetched by `take_exits`.
        self._exits: list[ProcessExit] = []
        #: Adopted main processes to be watched, by pidfd.
        self.pidfds: dict[int, Replica] = {}
        #: The start of our mark in a process's environment.
        self._mark_prefix = records.state_id + "/"

    # --- reading ---

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def running(self) -> int:
        """Replicas that have not ended, those being cleared included."""
        return sum(replica.exit is None for replica in self._replicas.values())

    @property
    def ended(self) -> int:
        """Ends that nobody has forgotten."""
        return len(self._replicas) - self.running

    def states(self) -> tuple[ProcessState, ...]:
        return tuple(
            ProcessState(
                key=replica.key,
                pid=replica.pid,
                start_time=replica.start_time,
                at_ms=replica.at_ms,
                stopping=replica.stopping,
                exit=replica.exit,
            )
            for _, replica in sorted(self._replicas.items())
        )

    def take_exits(self) -> tuple[ProcessExit, ...]:
        """Ends since the last call."""
        exits, self._exits = tuple(self._exits), []
        return exits

    def next_deadline(self) -> float | None:
        """When `tick` has something to do, on the monotonic clock."""
        deadlines = [replica.kill_at for replica in self._stopping.values() if replica.kill_at is not None]
        now = time.monotonic()
        deadlines += [
            now + _LOOK_S if replica.adopted or self._doubts else replica.clear_until
            for replica in self._clearing.values()
        ]
        if self._leases.waits:
            deadlines.append(now + LOOK_S)
        return min(deadlines, default=None)

    # --- requests ---

    def start(self, spec: ProcessSpec) -> StartResult:
        known = self._replicas.get(spec.key)
        if known is not None:
            return Started(key=known.key, pid=known.pid, start_time=known.start_time, at_ms=known.at_ms)
        try:
            self._records.append(Intent(spec.key, spec.account.uid, spec.lease_ms, spec.lease_grace_ms))
            try:
                pid = spawn(spec, f"{self._mark_prefix}{spec.key}")
            except StartRefused as refused:
                self._records.append(Refusal(spec.key))
                return Refused(key=spec.key, code=refused.code, detail=refused.detail)
        except OSError as error:
            return Refused(
                key=spec.key, code="LauncherFailed", detail=f"the supervisor cannot write its records: {error.strerror}"
            )
        facts = kernel.facts_of(pid)  # our child, not reaped: it is there, if only as a zombie
        start_time = facts.start_time if facts is not None else 0
        replica = Replica(
            key=spec.key, pid=pid, start_time=start_time, at_ms=time.time_ns() // 1_000_000, uid=spec.account.uid
        )
        self._cgroups.admit(spec.key, pid, spec.limits)
        self._replicas[spec.key] = self._mains[pid] = replica
        self._record(self._line(replica, Lease(spec.lease_ms, spec.lease_grace_ms)))
        if spec.lease_ms:
            self._leases.hold(spec.key, Lease(spec.lease_ms, spec.lease_grace_ms))
            self.renew(spec.renewed_ms)
        _be_ordinary_to_oom_killer(pid)
        return Started(key=spec.key, pid=pid, start_time=start_time, at_ms=replica.at_ms)

    def stop(self, key: AssignmentKey, grace_ms: int) -> None:
        replica = self._replicas.get(key)
        if replica is None or replica.ending is not None:
            return
        if grace_ms > 0 and not replica.stopping:
            self.freeze(key, False)
            self._signal(replica, signal.SIGTERM)
            self._signal(replica, signal.SIGCONT)  # a stopped process would not see it
        kill_at = time.monotonic() + max(grace_ms, 0) / 1000
        replica.stopping = True
        replica.kill_at = kill_at if replica.kill_at is None else min(kill_at, replica.kill_at)
        self._stopping[key] = replica
        if grace_ms <= 0:
            self.tick()

    def freeze(self, key: AssignmentKey, frozen: bool) -> None:
        """Halt the whole tree, or let it go on. What is being stopped is not frozen any more."""
        replica = self._replicas.get(key)
        if replica is None or replica.ending is not None or (frozen and replica.stopping):
            return
        if frozen == (key in self._frozen):
            return
        (self._frozen.add if frozen else self._frozen.discard)(key)
        if not self._cgroups.freeze(key, frozen):
            self._signal(replica, signal.SIGSTOP if frozen else signal.SIGCONT)

    def limit_memory(self, key: AssignmentKey, memory_mib: int) -> None:
        self._cgroups.limit_memory(key, memory_mib)

    def renew(self, renewed_ms: int) -> None:
        if self._leases.renew(renewed_ms):
            self._record(Renewed(renewed_ms))
            if self._records.wants_rewrite(len(self._replicas)):
                self._records.rewrite(self._remembered())

    def thaw_all(self) -> None:
        """Nobody is there who would do it later."""
        for key in list(self._frozen):
            self.freeze(key, False)

    def forget(self, key: AssignmentKey) -> None:
        replica = self._replicas.get(key)
        if replica is not None and replica.exit is not None:
            del self._replicas[key]
            self._record(Forgotten(key))
            if self._records.wants_rewrite(len(self._replicas)):
                self._records.rewrite(self._remembered())

    # --- what happens ---

    def reap(self) -> None:
        """Take notice of children that have ended."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if found is None:
                break
            pid = found.si_pid
            replica = self._mains.pop(pid, None)
            if replica is not None:
                _kill_group(pid, signal.SIGKILL)
                self._cgroups.kill(replica.key)
            _, status = os.waitpid(pid, 0)
            self._strays.pop(pid, None)
            self._doubts.pop(pid, None)
            if replica is not None:
                self._begin_clearing(replica, status)
        self._clear()

    def main_ended(self, pidfd: int) -> None:
        """An adopted main process has ended."""
        replica = self.pidfds.pop(pidfd)
        status = kernel.exit_status_by_pidfd(pidfd, replica.pid)
        os.close(pidfd)
        replica.pidfd = -1
        self._begin_clearing(replica, status)
        self._clear()

    def tick(self) -> None:
        """Kill those whose grace is over, and go on clearing."""
        now = time.monotonic()
        if self._leases.waits:
            for key, grace_ms in self._leases.run_out(boot_clock_ms()):
                self._log("lease-over", str(key))
                self.stop(key, grace_ms)
        for key, replica in list(self._stopping.items()):
            if replica.kill_at is not None and replica.kill_at <= now:
                del self._stopping[key]
                replica.kill_at = None
                self._signal(replica, signal.SIGKILL)
                self._cgroups.kill(key)
        self._clear()

    def _signal(self, replica: Replica, number: signal.Signals) -> None:
        """To the whole group. Our own children keep their number until reaped; an adopted one may have lost it."""
        if replica.adopted:
            facts = kernel.facts_of(replica.pid)
            if facts is None or facts.start_time != replica.start_time:
                return
        _kill_group(replica.pid, number)

    # --- clearing ---

    def _begin_clearing(self, replica: Replica, status: int | None) -> None:
        self._stopping.pop(replica.key, None)
        self._frozen.discard(replica.key)
        self._cgroups.kill(replica.key)
        now_ms = time.time_ns() // 1_000_000
        code = os.waitstatus_to_exitcode(status) if status is not None else 0
        replica.ending = ProcessExit(
            key=replica.key,
            exit_code=max(code, 0),
            signal=max(-code, 0),
            lost=status is None,
            stopped=replica.stopping,
            expired=self._leases.is_over(replica.key),
            started_ms=replica.at_ms,
            at_ms=now_ms,
            detail="" if status is not None else "it ended after its supervisor had been killed: nobody saw how",
        )
        replica.clear_until = time.monotonic() + CLEAR_S
        self._clearing[replica.key] = replica

    def _clear(self) -> None:
        """Kill what is left of trees whose main process has ended, and tell the ends of those that are gone."""
        if not self._clearing:
            return
        now = time.monotonic()
        in_doubt = False
        left: dict[AssignmentKey, list[int]] = {}
        for pid in kernel.own_children():
            if pid in self._mains:
                continue
            if self._is_in_doubt(pid, now):
                in_doubt = True
                continue
            owner = self._owner_of(pid)
            if owner is not None and (owner in self._clearing or owner not in self._replicas):
                left.setdefault(owner, []).append(pid)
        for key in self._clearing:
            if pids := [pid for pid in self._cgroups.pids(key) if pid not in self._mains]:
                left.setdefault(key, []).extend(pids)
        if any(replica.adopted for replica in self._clearing.values()):
            for key, pids in self._search().items():
                if key in self._clearing:
                    left.setdefault(key, []).extend(pids)
        for pids in left.values():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        for key, replica in list(self._clearing.items()):
            pids = left.get(key, [])
            replica.quiet_since = None if pids else replica.quiet_since or now
            must_wait = pids or in_doubt or (replica.adopted and now - (replica.quiet_since or now) < _LOOK_S)
            if not must_wait or now > replica.clear_until:
                self._end(replica, pids)

    def _is_in_doubt(self, pid: int, now: float) -> bool:
        """Whether this child may be in the middle of an exec, so that whose it is will show in an instant."""
        if pid in self._strays or kernel.has_environment(pid):
            self._doubts.pop(pid, None)
            return False
        return now - self._doubts.setdefault(pid, now) < _DOUBT_S

    def _owner_of(self, pid: int) -> AssignmentKey | None:
        """Whose stray this child is; None while that cannot be told."""
        owner = self._strays.get(pid)
        if owner is not None:
            return owner
        facts = kernel.facts_of(pid)
        if facts is None or facts.state == "Z":
            return None  # about to be reaped
        owner = self._marked_owner(pid, facts)
        if owner is None:
            uid = kernel.owner_of(pid)
            present = [replica for replica in self._replicas.values() if replica.exit is None]
            candidates = [replica for replica in present if replica.uid == uid] or present
            return candidates[0].key if len(candidates) == 1 else None  # not for certain, so not kept
        self._strays[pid] = owner
        return owner

    def _marked_owner(self, pid: int, facts: kernel.ProcessFacts) -> AssignmentKey | None:
        key = self._marked(pid)
        if key is not None:
            return key
        for replica in self._clearing.values():
            if replica.pid in (facts.session, facts.group) and facts.start_time >= replica.start_time:
                return replica.key
        return self._mains[facts.session].key if facts.session in self._mains else None

    def _marked(self, pid: int) -> AssignmentKey | None:
        """The key in the process's environment, which is the process's own to write: whatever stands there."""
        mark = kernel.environment_value(pid, MARK)
        if mark is None or not mark.startswith(self._mark_prefix):
            return None
        try:
            return AssignmentKey.parse(mark.removeprefix(self._mark_prefix))
        except ValueError:
            return None

    def _search(self) -> dict[AssignmentKey, list[int]]:
        """Every living process of a tree that an earlier supervisor started, main processes excepted, by key."""
        found: dict[AssignmentKey, list[int]] = {}
        mains = set(self._mains) | {replica.pid for replica in self.pidfds.values()}
        leaders = {replica.pid: replica for replica in self._clearing.values() if replica.adopted and replica.pid}
        everything = [facts for pid in kernel.all_pids() if (facts := kernel.facts_of(pid)) is not None]
        for facts in everything:
            if facts.pid in leaders and facts.start_time != leaders[facts.pid].start_time:
                del leaders[facts.pid]  # the number is another's by now, so nothing of the old group is left
        for facts in everything:
            if facts.pid in mains or facts.state == "Z":
                continue
            leader = leaders.get(facts.session) or leaders.get(facts.group)
            key = leader.key if leader is not None else self._marked(facts.pid)
            if key is not None:
                found.setdefault(key, []).append(facts.pid)
        return found

    def _end(self, replica: Replica, left: list[int]) -> None:
        ending = replica.ending
        if ending is None:
            raise AssertionError(f"{replica.key} is being cleared and has not ended")
        if left:
            pids = ", ".join(map(str, left))
            ending = msgspec.structs.replace(ending, detail=f"processes that do not die were left behind: {pids}")
            self._log("strays-left", f"{replica.key}: {pids}")
        replica.exit = ending
        self._leases.drop(replica.key)
        self._cgroups.remove(replica.key)
        del self._clearing[replica.key]
        self._record(Ending(ending))
        self._exits.append(ending)

    @staticmethod
    def _line(replica: Replica, lease: Lease) -> Running:
        start = replica.key, replica.pid, replica.start_time, replica.at_ms, replica.uid
        return Running(*start, lease.lease_ms, lease.grace_ms)

    def _record(self, line: Running | Ending | Forgotten | Renewed) -> None:
        """Write down what has happened already: a full disk cannot make it undone, so it is told in the log alone."""
        try:
            self._records.append(line)
        except OSError as error:
            self._log("record-failed", f"{line}: {error.strerror}")

    # --- what an earlier supervisor left ---

    def recover(self) -> None:
        """Take up the records: adopt what still runs, end what does not."""
        remembered = self._records.remembered
        for key, (start, ending) in remembered.ended.items():
            self._replicas[key] = Replica(
                key=key,
                pid=start.pid if start else 0,
                start_time=start.start_time if start else 0,
                at_ms=ending.started_ms,
                uid=start.uid if start else 0,
                stopping=ending.stopped,
                ending=ending,
                exit=ending,
            )
        for line in remembered.running.values():
            self._recover_running(line)
        if remembered.intents:
            marked = self._search()
            for intent in remembered.intents.values():
                self._recover_intent(intent, marked.get(intent.key, []))
        self._clear()

    def _recover_running(self, line: Running) -> None:
        replica = Replica(
            key=line.key, pid=line.pid, start_time=line.start_time, at_ms=line.at_ms, uid=line.uid, adopted=True
        )
        self._replicas[line.key] = replica
        self._leases.hold(line.key, Lease(line.lease_ms, line.lease_grace_ms))
        if self._records.same_boot:
            self._cgroups.adopt(line.key, line.pid)
        else:
            replica.adopted = False  # nothing of it can be left to search for
            self._lose(replica, "the node was restarted while it ran")
            return
        try:
            pidfd = os.pidfd_open(line.pid)
        except ProcessLookupError:
            pidfd = -1
        facts = kernel.facts_of(line.pid)
        if pidfd >= 0 and facts is not None and facts.start_time == line.start_time:
            replica.pidfd = pidfd
            self.pidfds[pidfd] = replica
            self._log("adopted", f"{line.key}: process {line.pid} goes on")
            return
        if pidfd >= 0:
            os.close(pidfd)
        self._lose(replica, "it ended while no supervisor was there: nobody saw how")

    def _recover_intent(self, intent: Intent, marked: list[int]) -> None:
        """Killed between making a process and writing down its pid. What runs is the start that was asked for."""
        leaders = [facts for pid in marked if (facts := kernel.facts_of(pid)) is not None and facts.session == pid]
        first = min(leaders, key=lambda facts: facts.start_time, default=None)
        now_ms = time.time_ns() // 1_000_000
        if first is not None and self._records.same_boot:
            lease = intent.lease_ms, intent.lease_grace_ms
            line = Running(intent.key, first.pid, first.start_time, now_ms, intent.uid, *lease)
            self._record(line)
            self._recover_running(line)
            return
        self._cgroups.adopt(intent.key, 0)
        replica = Replica(key=intent.key, pid=0, start_time=0, at_ms=now_ms, uid=intent.uid, adopted=True)
        self._replicas[intent.key] = replica
        self._lose(replica, "the supervisor was killed while it was being started")

    def _lose(self, replica: Replica, detail: str) -> None:
        self._begin_clearing(replica, None)
        if replica.ending is not None:
            replica.ending = msgspec.structs.replace(replica.ending, detail=detail)

    def _remembered(self) -> Remembered:
        kept = Remembered(renewed_ms=self._leases.renewed_ms)
        for key, replica in self._replicas.items():
            line = self._line(replica, self._leases.of(key))
            if replica.exit is None:
                kept.running[key] = line
            else:
                kept.ended[key] = (line, replica.exit)
        return kept


def _kill_group(group: int, number: signal.Signals) -> None:
    # EPERM: everything in the group has become another user's, which only a non-root supervisor can meet.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _be_ordinary_to_oom_killer(pid: int) -> None:
    """The supervisor protects itself from the OOM killer; its children must not inherit that."""
    if os.geteuid() == 0:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "wb") as file:
            file.write(b"0")
