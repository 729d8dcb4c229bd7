"""The agent's core in a hostile world: messages come twice, late and from deposed leaders, actions finish in any order,
and the agent is killed at any moment.

The world around the core is small and honest: a launcher that remembers every start it was not told to forget, cards
that are made and undone, a ledger that holds what a turn made durable. Whatever happens:

- a key is started once at most, and never after its end was reported;
- an assignment that was taken ends in exactly one `Ended`;
- what was refused or repeated changes nothing;
- what the core takes for suspended is off its card, what it takes for running is on it, and no step is answered twice.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpuyard_agent.core.actions import (
    Action,
    Answer,
    ForgetProcess,
    HoldPort,
    PreparePartition,
    ResumeProcess,
    StartProcess,
    StopProcess,
    SuspendProcess,
    UndoPartition,
)
from gpuyard_agent.core.events import (
    CardBroke,
    CardReturned,
    Event,
    InventoryRead,
    OrdersReceived,
    PartitionFailed,
    PartitionReady,
    PartitionUndone,
    PortFree,
    PortTaken,
    ProcessesListed,
    ProcessExited,
    ProcessFound,
    ProcessRefused,
    ProcessResumed,
    ProcessStarted,
    ProcessSuspended,
    ReportsDelivered,
    ResumeRefused,
    SuspendRefused,
    SyncReceived,
    TimePassed,
    UndoFailed,
)
from gpuyard_protocol.names import AssignmentKey
from gpuyard_protocol.nodes import (
    Desired,
    Ended,
    Go,
    Inventory,
    Joined,
    Order,
    OrderBatch,
    Resume,
    Resumed,
    ResumeFailed,
    Start,
    Stop,
    Suspend,
    Suspended,
    SuspendFailed,
)
from gpuyard_protocol.resources import Device, NoGpu, WholeCards
from support.agent_core import NODE, CoreHarness
from support.agents import start_order

CARD = "GPU-1"
CARDS = Inventory(
    hostname="a",
    address="b",
    cpu_milli=1000,
    memory_mib=1,
    devices=(Device(uuid=CARD, index=0, model="H100", memory_mib=80_000, modes=("whole",)),),
)
JOBS = st.integers(min_value=1, max_value=4)


class HostileWorld(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.core = CoreHarness()
        #: Asked for and not carried out yet: lost when the agent is killed.
        self.pending: list[Action] = []
        #: What the launcher remembers: whether it still runs.
        self.processes: dict[AssignmentKey, bool] = {}
        #: Processes ever made, by key.
        self.made: dict[AssignmentKey, int] = {}
        #: Every message ever sent, to be delivered again.
        self.sent: list[Event] = []
        self.issued: dict[AssignmentKey, Start] = {}
        #: Left out of a sync: the daemon never speaks of them again.
        self.dropped: set[AssignmentKey] = set()
        self.taken: set[AssignmentKey] = set()
        #: Whose work lies in the host's memory.
        self.off_card: set[AssignmentKey] = set()
        #: The newest step that was answered by whoever carries it out, since the agent's start.
        self.answered: dict[AssignmentKey, int] = {}
        #: The last step of each key, and the order that it was.
        self.standing: dict[AssignmentKey, Suspend | Resume] = {}
        self.attempts = 0
        self.epoch = 7

    # --- the daemon ---

    def tell(self, *events: Event) -> None:
        self.pending.extend(self.core.tell(*events).actions)
        self.taken |= self.core.core.live.keys() | self.core.ended.keys()

    def issue(self, *orders: Order) -> None:
        first = self.core.ordered + 1
        self.core.ordered += len(orders)
        batch = OrderBatch(node=NODE, instance=self.core.instance, epoch=self.epoch, first=first, orders=orders)
        event = OrdersReceived(len(self.sent), batch)
        self.sent.append(event)
        self.tell(event)

    def sync(self, *desired: Desired) -> None:
        self.core.epoch = self.epoch
        event = SyncReceived(len(self.sent), self.core.next_sync(*desired))
        self.sent.append(event)
        self.tell(event)

    @rule(is_gang=st.booleans(), has_limit=st.booleans(), is_lost=st.booleans())
    def order_a_start(self, is_gang: bool, has_limit: bool, is_lost: bool) -> None:
        self.attempts += 1
        launch = {"time_limit_ms": 5_000} if has_limit else {}
        place = WholeCards((CARD,)) if self.attempts % 2 else NoGpu()
        start = start_order(
            self.attempts % 5,
            "x",
            attempt=self.attempts,
            hold=is_gang,
            replicas=1 + is_gang,
            partition=place,
            suspendable=True,
            **launch,
        )
        self.issued[start.key] = start
        if is_lost:  # the number is given, the message never arrives
            self.core.ordered += 1
        else:
            self.issue(start)

    def known(self) -> list[AssignmentKey]:
        """What the daemon may still speak of: not what it has left out of a sync, nor what ended long ago."""
        return sorted(
            key
            for key in self.issued
            if key not in self.dropped and (key in self.core.ended or not self.is_delivered(key))
        )

    @precondition(lambda self: self.known())
    @rule(data=st.data(), grace_ms=st.integers(0, 9))
    def order_a_stop(self, data: st.DataObject, grace_ms: int) -> None:
        self.issue(Stop(key=data.draw(st.sampled_from(self.known())), grace_ms=grace_ms))

    @precondition(lambda self: self.known())
    @rule(data=st.data())
    def order_go(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.known()))
        self.issue(Go(key=key, master_address="10.0.0.1", master_port=29_500))

    @rule(moves=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=6))
    def a_job_gets_under_way(self, moves: list[tuple[bool, bool, bool]]) -> None:
        """Started without trouble, then sent to and fro: (down, carried out, in vain)."""
        self.attempts += self.attempts % 2  # the next one has a card
        self.a_card_returns()
        self.order_a_start(is_gang=False, has_limit=False, is_lost=False)
        key = max(self.issued, key=lambda key: key.attempt)
        self.carry_out_all_of(key)
        for is_down, is_done, fails in moves:
            step = self.standing[key].step + 1 if key in self.standing else 1
            order = self.standing[key] = Suspend(key=key, step=step) if is_down else Resume(key=key, step=step)
            self.issue(order)
            if is_done:
                self.carry_out_all_of(key, fails=fails)

    def carry_out_all_of(self, key: AssignmentKey, *, fails: bool = False) -> None:
        while index := next((n for n, one in enumerate(self.pending, 1) if getattr(one, "key", None) == key), 0):
            self.carry_out(self.pending.pop(index - 1), fails=fails)

    @precondition(lambda self: self.known())
    @rule(data=st.data(), is_down=st.booleans(), is_lost=st.booleans())
    def order_a_step(self, data: st.DataObject, is_down: bool, is_lost: bool) -> None:
        key = data.draw(st.sampled_from(self.known()))
        last = self.standing.get(key)
        step = last.step + 1 if last else 1
        order = self.standing[key] = Suspend(key=key, step=step) if is_down else Resume(key=key, step=step)
        if is_lost:
            self.core.ordered += 1
        else:
            self.issue(order)

    @rule(data=st.data())
    def order_a_sync(self, data: st.DataObject) -> None:
        """What the daemon wants may include what has ended, if it has not read that yet."""
        known = self.known()
        wanted = data.draw(st.lists(st.sampled_from(known), unique=True)) if known else []
        self.dropped |= self.issued.keys() - set(wanted)
        self.sync(*(Desired(start=self.issued[key], standing=self.standing.get(key)) for key in wanted))

    def is_delivered(self, key: AssignmentKey) -> bool:
        delivered = self.core.core.counters.delivered
        return any(isinstance(report, Ended) and report.key == key for report in self.core.reports[:delivered])

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def a_message_comes_again(self, data: st.DataObject) -> None:
        """Whatever it was, and however late: it was taken, or never will be."""
        rows, ended = dict(self.core.rows), dict(self.core.ended)
        told = self.core.tell(data.draw(st.sampled_from(self.sent)))
        assert self.core.rows == rows
        assert self.core.ended.items() <= ended.items()  # old keys may be forgotten by the way
        assert told.others == []

    @rule()
    def a_new_leader_takes_over(self) -> None:
        self.epoch += 1

    @precondition(lambda self: self.core.core.counters.epoch > 6)
    @rule()
    def a_deposed_leader_orders(self) -> None:
        start = start_order(99, "x", attempt=1)
        batch = OrderBatch(
            node=NODE, instance=self.core.instance, epoch=6, first=self.core.core.counters.applied + 1, orders=(start,)
        )
        assert self.core.tell(OrdersReceived(0, batch)).others == []
        assert start.key not in self.core.core.live

    # --- the node ---

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), fails=st.booleans())
    def an_action_is_carried_out(self, data: st.DataObject, fails: bool) -> None:
        index = data.draw(st.integers(0, min(len(self.pending) - 1, 5)))
        if isinstance(chosen := self.pending[index], SuspendProcess | ResumeProcess):  # one way at a time, in order
            index = next(
                number
                for number, action in enumerate(self.pending)
                if isinstance(action, SuspendProcess | ResumeProcess) and action.key == chosen.key
            )
        self.carry_out(self.pending.pop(index), fails=fails)

    def carry_out(self, action: Action, *, fails: bool = False) -> None:
        match action:
            case PreparePartition(key=key):
                self.tell(PartitionFailed(key, "PartitionUnavailable", "no") if fails else PartitionReady(key))
            case HoldPort(key=key, port=port):
                self.tell(PortTaken(key, port) if fails else PortFree(key, port))
            case StartProcess(key=key):
                self.start(key, fails=fails)
            case StopProcess(key=key, grace_ms=grace_ms):
                assert grace_ms == 0 or key not in self.off_card, "a halted process was given a grace"
                if self.processes.get(key):
                    self.exit(key)
            case SuspendProcess(key=key, step=step, gpu_pids=gpu_pids):
                if gpu_pids or step > self.answered.get(key, 0):
                    self.answered[key] = step
                    self.carry_over(key, down=True, fails=fails)
            case ResumeProcess(key=key, step=step):
                if step > self.answered.get(key, 0):
                    self.answered[key] = step
                    self.carry_over(key, down=False, fails=fails)
            case UndoPartition(key=key):
                assert not self.processes.get(key), "undone under a running process"
                self.tell(UndoFailed(key, "busy") if fails else PartitionUndone(key))
            case ForgetProcess(key=key):
                if self.processes.get(key) is False:
                    del self.processes[key]
            case Answer():
                pass

    def start(self, key: AssignmentKey, *, fails: bool) -> None:
        if key not in self.processes:
            if fails:
                self.tell(ProcessRefused(key, "CommandNotFound", "no"))
                return
            assert key not in self.core.ended, "started after its end"
            self.made[key] = self.made.get(key, 0) + 1
            self.processes[key] = True
        self.tell(ProcessStarted(key, 100, self.core.wall_ms))

    def carry_over(self, key: AssignmentKey, *, down: bool, fails: bool) -> None:
        """What is off the card already is found there, however often it is asked for."""
        fails = fails or not self.processes.get(key)
        if down and fails and key not in self.off_card:
            self.tell(SuspendRefused(key, "DriverRefused", "no"))
        elif down:
            self.off_card.add(key)
            self.tell(ProcessSuspended(key, (100,), 1, 1))
        elif fails and key in self.off_card:
            self.tell(ResumeRefused(key, "PartitionUnavailable", "no"))
        else:
            self.off_card.discard(key)
            self.tell(ProcessResumed(key, 1))

    def exit(self, key: AssignmentKey) -> None:
        self.processes[key] = False
        self.off_card.discard(key)
        self.tell(ProcessExited(key, exit_code=1, at_ms=self.core.wall_ms, started_ms=self.core.wall_ms))

    @precondition(lambda self: any(self.processes.values()))
    @rule(data=st.data())
    def a_process_ends(self, data: st.DataObject) -> None:
        self.exit(data.draw(st.sampled_from(sorted(key for key, runs in self.processes.items() if runs))))

    @rule(ms=st.integers(1, 700_000))
    def time_passes(self, ms: int) -> None:
        self.core.now_ms += ms
        self.core.wall_ms += ms
        self.tell(TimePassed())

    @rule(data=st.data())
    def reports_are_delivered(self, data: st.DataObject) -> None:
        self.tell(ReportsDelivered(data.draw(st.integers(0, len(self.core.reports)))))

    @rule()
    def a_card_breaks(self) -> None:
        """From then on the daemon knows before it hears of any end on that card."""
        self.tell(InventoryRead(CARDS), CardBroke(CARD, "Xid 79"))
        joined = [report for report in self.core.reports if isinstance(report, Joined)][-1:]
        on_card = [
            found
            for found in self.core.core.live.values()
            if found.start.partition != NoGpu() and found.state != "suspended"
        ]
        assert not on_card or not joined[0].inventory.devices[0].healthy

    @rule()
    def a_card_returns(self) -> None:
        self.tell(CardReturned(CARD), InventoryRead(CARDS))

    @rule()
    def the_agent_is_killed(self) -> None:
        """What was asked and not carried out is gone; the launcher tells what it knows, then every end again."""
        self.pending, self.answered = [], {}
        self.pending.extend(self.core.restart(found=self.listing()).actions)
        self.retell()

    @rule()
    def the_launcher_was_out_of_reach(self) -> None:
        self.pending = [action for action in self.pending if not isinstance(action, StartProcess | StopProcess)]
        self.tell(ProcessesListed(tuple(self.listing())))

    def listing(self) -> list[ProcessFound]:
        return [
            ProcessFound(key, 100, self.core.wall_ms, has_ended=not runs)
            for key, runs in sorted(self.processes.items())
        ]

    def retell(self) -> None:
        for assignment in list(self.core.core.live.values()):
            if assignment.state != "ending":
                self.tell(PartitionReady(assignment.key))
        for key, runs in sorted(self.processes.items()):
            if not runs:
                self.tell(ProcessExited(key, exit_code=1, started_ms=self.core.wall_ms))

    # --- what must hold ---

    @invariant()
    def nothing_starts_twice(self) -> None:
        assert all(count == 1 for count in self.made.values())

    @invariant()
    def everybody_is_where_the_core_takes_it_to_be(self) -> None:
        for key, found in self.core.core.live.items():
            if found.state in ("running", "suspended") and self.processes.get(key):
                assert (key in self.off_card) == (found.state == "suspended"), f"{key} is {found.state}"

    @invariant()
    def no_step_is_answered_twice(self) -> None:
        answers = [
            (report.key, report.step)
            for report in self.core.reports
            if isinstance(report, Suspended | Resumed | SuspendFailed | ResumeFailed)
        ]
        assert len(answers) == len(set(answers))

    def teardown(self) -> None:
        """In a kind world everything that was taken comes to its end, once."""
        self.epoch += 1
        self.sync()
        for _ in range(500):
            if not self.pending and not self.core.core.live:
                break
            while self.pending:
                self.carry_out(self.pending.pop(0))
            self.core.now_ms += 60_000
            self.tell(TimePassed())
        assert not self.core.core.live
        ends = [report.key for report in self.core.reports if isinstance(report, Ended)]
        assert sorted(ends) == sorted(self.taken)
        assert not any(self.processes.values()), "a process was left running"


TestHostileWorld = HostileWorld.TestCase
TestHostileWorld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
