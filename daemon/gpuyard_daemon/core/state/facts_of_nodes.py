"""What the journal keeps of nodes: what they are and report, what operators and silence make of them, and their cards.

A part of the closed union `facts.Fact`, whose rules hold here.
"""

from __future__ import annotations

from typing import Literal

from gpuyard_daemon.core.state.fact_words import FactBase, NodeState
from gpuyard_protocol.names import AssignmentKey, DeviceUuid, NodeId, User
from gpuyard_protocol.nodes import Inventory


class ReportsTaken(FactBase, frozen=True, tag="reports"):
    """A node's reports up to `last` were taken in."""

    node: NodeId
    last: int
    #: Numbers that never came. Never seen so far; journaled so that it can be found.
    missing: int = 0


class LedgerReplaced(FactBase, frozen=True, tag="new-ledger"):
    """A node of a known name came with a ledger that was made anew: its numbers begin again."""

    node: NodeId


class NodeJoined(FactBase, frozen=True, tag="joined"):
    """An agent process reported what the node has."""

    node: NodeId
    instance: str
    boot_id: str
    inventory: Inventory
    #: Identity of its ledger; "": not told.
    ledger: str = ""


class NodeChanged(FactBase, frozen=True, tag="node"):
    """A node's state changed."""

    node: NodeId
    state: NodeState
    reason: str = ""
    #: Fenced because two agent processes speak for it.
    twins: bool = False


class ReplicasGivenUp(FactBase, frozen=True, tag="given-up"):
    """What a lost node had is taken for gone, and the node is told to stop it. Their ends follow as facts of their own;
    the node takes no work until it has confirmed each."""

    node: NodeId
    keys: tuple[AssignmentKey, ...]


class GivenUpGone(FactBase, frozen=True, tag="gone"):
    """The node says that what was given up does not run there (any more)."""

    node: NodeId
    key: AssignmentKey


class NodeCordoned(FactBase, frozen=True, tag="cordoned"):
    """An operator keeps new work away from a node; what runs there goes on."""

    node: NodeId
    by: User
    reason: str = ""


class NodeUncordoned(FactBase, frozen=True, tag="uncordoned"):
    """It takes work again."""

    node: NodeId


class NodeForgotten(FactBase, frozen=True, tag="node-removed"):
    """A node has left the yard. Its numbers are kept, should it ever come back."""

    node: NodeId


class NodeAvoided(FactBase, frozen=True, tag="avoided"):
    """A node could not set up a mode, containers or an account: nothing more of that kind goes there until then."""

    node: NodeId
    #: As a key of `Node.avoided`.
    mode: str
    until_ms: int
    #: In a row.
    times: int


class NodeForgiven(FactBase, frozen=True, tag="forgiven"):
    """The time of `NodeAvoided` is over."""

    node: NodeId
    mode: str


class CardSwitched(FactBase, frozen=True, tag="switched"):
    """A card was given to work for which it goes into MIG mode, or out of it; it keeps that mode for a while."""

    node: NodeId
    card: DeviceUuid
    in_mig: bool
    until_ms: int


class CardSettled(FactBase, frozen=True, tag="settled"):
    """It may switch again."""

    node: NodeId
    card: DeviceUuid


class ReplicaPrepared(FactBase, frozen=True, tag="prepared"):
    key: AssignmentKey
    port: int


class ReplicaStarted(FactBase, frozen=True, tag="started"):
    key: AssignmentKey
    port: int = 0


class ReplicaEnded(FactBase, frozen=True, tag="replica-ended"):
    """A replica is gone from its node, and its partition is free."""

    key: AssignmentKey
    outcome: Literal["exited", "signalled", "stopped", "refused", "lost"]
    exit_code: int = 0
    signal: int = 0
    code: str = ""
    detail: str = ""
    #: Of a refusal: the node said that it is to blame, whatever the code.
    node_fault: bool = False
