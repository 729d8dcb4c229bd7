"""Heartbeats in, changes out: only silence that could have been heard counts."""

from __future__ import annotations

from gpuyard_daemon.core.state.inputs import Input, NodeIncompatible, NodeLost, NodeReturned, NodeSuspected
from gpuyard_daemon.node_monitor import TICK_S, NodeMonitor
from gpuyard_protocol.bus.base import Message
from gpuyard_protocol.codec import encode
from gpuyard_protocol.nodes import DeviceSample, Heartbeat, Telemetry


class World:
    """A core that knows its nodes, takes every change in at once, and a clock that the test moves."""

    def __init__(self, *nodes: str) -> None:
        self.states = dict.fromkeys(nodes, "ready")
        self.instances = dict.fromkeys(nodes, "a")
        self.twinned: set[str] = set()
        self.now = 1000.0
        self.facts: list[Input] = []
        self.beats: list[tuple[str, str, int]] = []
        self.monitor = NodeMonitor(
            self,
            self._add,
            lambda *beat: self.beats.append(beat),
            suspected_after_s=3.0,
            lost_after_s=15.0,
            monotonic=lambda: self.now,
        )

    def known_nodes(self) -> tuple[str, ...]:
        return tuple(self.states)

    def node_state(self, node: str) -> str:
        return self.states.get(node, "")

    def node_instance(self, node: str) -> str:
        return self.instances.get(node, "")

    def node_is_twinned(self, node: str) -> bool:
        return node in self.twinned

    def _add(self, fact: Input) -> None:
        self.facts.append(fact)
        match fact:
            case NodeSuspected(node=node):
                self.states[node] = "suspected"
            case NodeLost(node=node):
                self.states[node] = "lost"
            case NodeReturned(node=node):
                self.states[node] = "ready"
                self.twinned.discard(node)
            case NodeIncompatible(node=node, twins=twins):
                self.states[node] = "incompatible"
                if twins:
                    self.twinned.add(node)

    def pass_s(self, seconds: float, *, beating: tuple[str, ...] = ()) -> None:
        """Time passes in ticks; the nodes named go on beating."""
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            for node in beating:
                self.beat(node)
            self.monitor.tick()

    def beat(self, node: str, instance: str = "a", *, v_min: int = 1, v_max: int = 1) -> None:
        beat = Heartbeat(node=node, instance=instance, boot_id="b", applied=7, reported=0, v_min=v_min, v_max=v_max)
        self.monitor.on_heartbeat_message(Message(f"hb.{node}", encode(beat)))


def test_a_silent_node_is_suspected_then_lost_and_each_is_told_once() -> None:
    world = World("n-1", "n-2")
    world.pass_s(60, beating=("n-2",))
    assert world.facts == [NodeSuspected(node="n-1"), NodeLost(node="n-1")]
    assert world.monitor.heard_ms_ago("n-1") == -1
    assert world.monitor.heard_ms_ago("n-2") == 0


def test_a_node_that_speaks_again_has_returned() -> None:
    world = World("n-1")
    world.pass_s(5)
    world.beat("n-1")
    world.beat("n-1")
    assert world.facts == [NodeSuspected(node="n-1"), NodeReturned(node="n-1", instance="a")]
    assert world.beats[-1] == ("n-1", "a", 7)


def test_a_process_that_has_not_joined_yet_does_not_bring_its_node_back() -> None:
    world = World("n-1")
    world.pass_s(5)
    world.beat("n-1", "b")
    assert world.facts == [NodeSuspected(node="n-1")]
    world.instances["n-1"] = "b"
    world.beat("n-1", "b")
    assert world.facts[-1] == NodeReturned(node="n-1", instance="b")


def test_an_agent_that_lived_through_a_stop_of_the_yard_brings_its_node_back() -> None:
    world = World("n-1")
    world.states["n-1"] = "joining"
    world.beat("n-1")
    assert world.facts == [NodeReturned(node="n-1", instance="a")]


def test_nobody_is_silent_while_this_side_hears_nothing() -> None:
    world = World("n-1")
    world.monitor.deafen()
    world.pass_s(100)
    assert world.facts == []
    world.monitor.grace()
    world.pass_s(2.5)
    assert world.facts == []
    world.pass_s(2)
    assert world.facts == [NodeSuspected(node="n-1")]


def test_a_pause_of_the_daemon_itself_is_nobody_elses_silence() -> None:
    world = World("n-1")
    world.now += 30
    world.monitor.tick()
    assert world.facts == []


def test_a_joined_node_has_its_full_time() -> None:
    world = World("n-1")
    world.pass_s(60)
    world.states["n-1"] = "ready"
    world.monitor.joined("n-1")
    world.facts.clear()
    world.pass_s(2.5)
    assert world.facts == []
    world.pass_s(2)
    assert world.facts == [NodeSuspected(node="n-1")]


def test_an_agent_of_another_time_is_incompatible_and_told_once() -> None:
    world = World("n-1")
    world.beat("n-1", v_min=3, v_max=4)
    world.beat("n-1", v_min=3, v_max=4)
    (fact,) = world.facts
    assert isinstance(fact, NodeIncompatible)
    assert "versions 3 to 4" in fact.reason


def test_an_agent_one_version_ahead_is_welcome() -> None:
    world = World("n-1")
    world.beat("n-1", v_min=1, v_max=2)
    world.beat("n-1", v_min=2, v_max=3)
    assert world.facts == []


def test_two_processes_that_speak_in_turn_fence_their_node() -> None:
    world = World("n-1")
    for _ in range(4):
        world.beat("n-1", "a")
        world.now += 0.5
        world.beat("n-1", "b")
        world.now += 0.5
    (fact,) = world.facts
    assert isinstance(fact, NodeIncompatible)
    assert "a and b" in fact.reason
    assert world.monitor.twins == {"n-1"}


def twinned() -> World:
    world = World("n-1")
    for _ in range(4):
        for instance in "ab":
            world.beat("n-1", instance)
            world.now += 0.5
    world.facts.clear()
    return world


def test_a_node_is_released_once_one_twin_has_been_silent_for_the_window() -> None:
    world = twinned()
    for _ in range(19):
        world.now += 0.5
        world.beat("n-1")
    assert world.facts == []
    world.now += 1
    world.beat("n-1")
    assert world.facts == [NodeReturned(node="n-1", instance="a")]
    assert world.monitor.twins == set()


def test_a_twin_that_speaks_within_the_window_keeps_its_node_fenced() -> None:
    world = twinned()
    for _ in range(5):
        world.now += 8
        world.beat("n-1", "b")
        world.now += 1
        world.beat("n-1", "a")
    assert world.states["n-1"] == "incompatible"


def test_the_twin_that_joined_last_must_be_the_one_that_stays() -> None:
    """The core takes no report of an earlier process, so it must be started again."""
    world = twinned()
    for _ in range(30):
        world.now += 0.5
        world.beat("n-1", "b")
    (fact,) = world.facts
    assert isinstance(fact, NodeIncompatible)
    assert "a) is gone and b speaks: restart it" in fact.reason


def test_a_restarted_daemon_releases_a_node_that_was_fenced_for_twins() -> None:
    world = World("n-1")
    world.states["n-1"] = "incompatible"
    world.twinned.add("n-1")
    world.pass_s(9, beating=("n-1",))
    assert world.states["n-1"] == "incompatible"
    world.pass_s(2, beating=("n-1",))
    assert world.states["n-1"] == "ready"


def test_a_node_that_falls_silent_while_it_is_fenced_is_lost() -> None:
    world = twinned()
    world.pass_s(20)
    assert world.facts == [NodeLost(node="n-1")]


def test_one_late_heartbeat_of_a_dead_process_fences_nothing() -> None:
    world = World("n-1")
    world.instances["n-1"] = "b"
    world.beat("n-1", "a")
    for second in range(30):
        world.now += 1
        world.beat("n-1", "b")
        if second == 4:
            world.beat("n-1", "a")
    assert world.facts == []


def test_a_restarted_agent_is_no_twin() -> None:
    world = World("n-1")
    for instance in "abcdef":
        world.beat("n-1", instance)
        world.now += 1
    assert world.facts == []


def test_telemetry_is_kept_for_known_nodes_and_poison_is_counted() -> None:
    world = World("n-1")
    good = Telemetry(node="n-1", at_ms=1, devices=(DeviceSample(uuid="GPU-1", utilization_pct=50),))
    world.monitor.on_telemetry_message(Message("tel.n-1.devices", encode(good)))
    for message in (
        Message("tel.n-2.devices", encode(good)),
        Message("tel.n-1.devices", b"\xff"),
        Message("hb.n-1", b"{}"),
    ):
        world.monitor.on_telemetry_message(message)
        world.monitor.on_heartbeat_message(message)
    assert world.monitor.telemetry == {"n-1": good}
    assert world.monitor.poison == 6


def test_nothing_is_kept_of_a_node_that_was_removed() -> None:
    world = World("n-1", "n-2")
    for node in ("n-1", "n-2"):
        world.beat(node)
        told = Telemetry(node=node, at_ms=1, devices=())
        world.monitor.on_telemetry_message(Message(f"tel.{node}.devices", encode(told)))
    world.states.pop("n-1")
    world.monitor.tick()
    assert set(world.monitor.telemetry) == {"n-2"}
    assert [world.monitor.heard_ms_ago(node) for node in ("n-1", "n-2")] == [-1, 0]
