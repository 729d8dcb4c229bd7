"""How cards are wired to each other: links over NVLink, and what lies between them on PCIe."""

from __future__ import annotations

from typing import Any

import pynvml

from gpuyard_agent.devices.nvml_calls import Lost, optional
from gpuyard_agent.devices.nvml_cards import Card
from gpuyard_protocol.names import DeviceUuid

#: What the driver calls the nearest thing that two cards have in common on PCIe, from near to far.
PCIE_LEVELS: dict[int, str] = {
    pynvml.NVML_TOPOLOGY_INTERNAL: "same-board",
    pynvml.NVML_TOPOLOGY_SINGLE: "same-switch",
    pynvml.NVML_TOPOLOGY_MULTIPLE: "switches",
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "host-bridge",
    pynvml.NVML_TOPOLOGY_NODE: "numa-node",
    pynvml.NVML_TOPOLOGY_SYSTEM: "system",
}
#: A driver newer than the binding may have more links than the binding knows.
_LINKS_MAX = max(36, pynvml.NVML_NVLINK_MAX_LINKS)


def peers_of(cards: list[Card]) -> dict[DeviceUuid, tuple[tuple[DeviceUuid, int], ...]]:
    """Peers of each card over NVLink, and how many links to each.

    A link to a switch reaches every other card with links to a switch; a direct link names its peer by PCI address.
    """
    by_bus = {card.facts.pci_bus_id.lower(): card.facts.uuid for card in cards}
    switched: dict[DeviceUuid, int] = {}
    direct: dict[DeviceUuid, dict[DeviceUuid, int]] = {}
    for card in cards:
        uuid = card.facts.uuid
        direct[uuid] = {}
        for kind, bus_id in card.links:
            if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                switched[uuid] = switched.get(uuid, 0) + 1
            elif kind == pynvml.NVML_NVLINK_DEVICE_TYPE_GPU and (peer := by_bus.get(bus_id)) is not None:
                direct[uuid][peer] = direct[uuid].get(peer, 0) + 1
    for uuid, links in switched.items():
        for peer, their_links in switched.items():
            if peer != uuid:
                direct[uuid][peer] = min(links, their_links)
    order = {card.facts.uuid: card.device.index for card in cards}
    return {uuid: tuple(sorted(peers.items(), key=lambda peer: order[peer[0]])) for uuid, peers in direct.items()}


def read_pcie(cards: list[Card]) -> dict[DeviceUuid, tuple[tuple[DeviceUuid, str], ...]]:
    """What lies between each card and every other, as words of `PCIE_LEVELS`; pairs that the driver does not tell are
    left out. It says nothing of NVLink."""
    found: dict[DeviceUuid, list[tuple[DeviceUuid, str]]] = {card.facts.uuid: [] for card in cards}
    for number, one in enumerate(cards):
        for other in cards[number + 1 :]:
            try:
                level = optional(pynvml.nvmlDeviceGetTopologyCommonAncestor, one.handle, other.handle)
            except Lost:
                continue
            if level in PCIE_LEVELS:
                found[one.facts.uuid].append((other.facts.uuid, PCIE_LEVELS[level]))
                found[other.facts.uuid].append((one.facts.uuid, PCIE_LEVELS[level]))
    order = {card.facts.uuid: card.device.index for card in cards}
    return {uuid: tuple(sorted(peers, key=lambda peer: order[peer[0]])) for uuid, peers in found.items()}


def read_links(handle: Any) -> tuple[tuple[int, str], ...]:
    """(type of the device at the other end, its PCI bus id in lower case) of each active link. Raises `Lost`."""
    found = []
    for link in range(_LINKS_MAX):
        if not optional(pynvml.nvmlDeviceGetNvLinkState, handle, link):
            continue
        kind = optional(pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            found.append((int(kind), ""))
            continue
        pci = optional(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
        if pci is not None:
            # A driver that does not tell the type names peers nevertheless.
            told = pynvml.NVML_NVLINK_DEVICE_TYPE_GPU if kind is None else int(kind)
            found.append((told, str(pci.busId).lower()))
    return tuple(found)
