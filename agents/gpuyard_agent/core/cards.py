"""Cards that break and return: what the daemon is told, and what becomes of the assignments that lie there.

A card that breaks is fenced in the same turn: the inventory with the card unhealthy is reported first, and every
assignment on it is ended as lost (`DeviceFault`) after that. In the other order the daemon would hear that the card is
free and place the next job there. An order that was on its way meanwhile ends the same way, before anything is made.

The partition of such an assignment may be impossible to undo: a lost card answers nothing. The assignment ends all the
same, since nobody is given a fenced card; the shell keeps the partition held and undoes it before it says that the card
has returned.
"""

from __future__ import annotations

import msgspec

from gpuyard_agent.core import life
from gpuyard_agent.core.book import Book
from gpuyard_agent.core.events import CardBroke
from gpuyard_protocol.names import DeviceUuid
from gpuyard_protocol.nodes import Inventory
from gpuyard_protocol.resources import devices_of


def read(book: Book, inventory: Inventory) -> None:
    """What the node has now. A card that broke stays broken until it is said to have returned."""
    book.inventory_read = _with_faults(book, inventory)
    book.tell_inventory()


def broke(book: Book, event: CardBroke) -> None:
    if event.only is None:
        book.broken[event.device] = event.detail
    hit = [
        assignment
        for key, assignment in sorted(book.live.items())
        if (event.device in devices_of(assignment.start.partition) if event.only is None else key in event.only)
        and assignment.state != "suspended"  # nothing of it is there
    ]
    if book.inventory_read is not None:
        book.inventory_read = _with_faults(book, book.inventory_read)
        book.tell_inventory(at_once=bool(hit))
    for assignment in hit:
        life.lose_card(book, assignment, event.detail)


def returned(book: Book, device: DeviceUuid) -> None:
    book.broken.pop(device, None)


def _with_faults(book: Book, inventory: Inventory) -> Inventory:
    if not any(device.uuid in book.broken for device in inventory.devices):
        return inventory
    devices = tuple(
        msgspec.structs.replace(device, healthy=False, fault=book.broken[device.uuid])
        if device.uuid in book.broken
        else device
        for device in inventory.devices
    )
    return msgspec.structs.replace(inventory, devices=devices)
