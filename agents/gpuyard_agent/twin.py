"""Of two live agents with one node's name, the second does not start work: it asks before it says a word, and exits.

The lock on the state directory keeps two agents of one host apart. This is for the rest: a copied virtual machine, a
configuration file copied to a second host. Such an agent would report jobs of the first as lost, and they would be
started again while they run. So, before its first report, an agent asks on `who.<node>`, which only this node's key may
say or hear; whoever holds the name answers. An agent that was cut off while it asked hears nobody and goes on; of such
two the daemon takes no work from either (it hears both heartbeats in turn) until one is stopped.
"""

from __future__ import annotations

import msgspec
import structlog

from gpuyard_agent.commands import Spawn
from gpuyard_agent.identity import Identity
from gpuyard_protocol.bus.base import Bus, BusError, Message, NoResponders, Unanswered
from gpuyard_protocol.codec import Malformed, decode, encode

#: An agent whose loop is so late does not answer heartbeats' deadlines either.
ANSWER_S = 1.0
TRIES = 2

_log = structlog.get_logger("gpuyard_agent.twin")


class NameTaken(Exception):
    """Another agent lives under this node's name; the text says where."""


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a node's name."""

    instance: str
    hostname: str
    pid: int


async def claim(bus: Bus, identity: Identity, holder: Holder, spawn: Spawn) -> None:
    """From now on this agent answers for the name. Raises `NameTaken`."""
    subject = f"who.{identity.node}"
    for _ in range(TRIES):
        try:
            answer = decode(Holder, (await bus.request(subject, b"", timeout=ANSWER_S)).data)
        except NoResponders:
            break
        except Unanswered:  # the server has not noticed yet that a connection is dead, such as our own last one's
            continue
        except (BusError, Malformed) as error:
            _log.warning("not asked for another agent of this name", why=str(error))
            break
        raise NameTaken(
            f"node {identity.node!r} is held by another live agent (host {answer.hostname}, process {answer.pid}): "
            "stop that one, or give this one a name, a key and a state directory of its own"
        )

    async def reply(to: str) -> None:
        try:
            await bus.publish(to, encode(holder))
        except BusError as error:
            _log.warning("not answered for the name", why=str(error))

    def on_question(message: Message) -> None:
        if message.reply:
            spawn(reply(message.reply))

    try:
        await bus.subscribe(subject, on_question)
    except BusError as error:
        _log.warning("not answering for the name", why=str(error))
