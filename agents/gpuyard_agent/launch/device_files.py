"""What a replica may use: its CPUs and memory, and the device files of its own cards and of no others.

Which file belongs to which card is read from the driver's own directory in /proc, so that no library is needed and
modelled cards have none. A replica without cards is kept from all of them. MIG instances are told apart by capability
files whose numbers are not known here, so a replica on one keeps what its account may open.
"""

from __future__ import annotations

from pathlib import Path

from gpuyard_agent.launch.base import Limits
from gpuyard_agent.partitions.base import PartitionGrant
from gpuyard_protocol.nodes import Launch

#: One directory for each card, by PCI address.
DRIVER = Path("/proc/driver/nvidia/gpus")
#: What every CUDA program opens besides its card.
_SHARED = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")
#: What programs on several nodes, or with file systems of their own, open; no card is reached through them.
_OTHERS = ("fuse", "gdrdrv", "infiniband/rdma_cm", "infiniband/uverbs*", "nvidia-caps-imex-channels/*")
#: systemd's backstop comes so much later than the agent's own time limit and grace.
BACKSTOP_MS = 600_000


def limits_of(launch: Launch, grant: PartitionGrant, driver: Path = DRIVER) -> Limits:
    """For one replica, by what was asked and what was granted."""
    # Halted time does not count, and systemd would count it.
    has_backstop = launch.time_limit_ms > 0 and grant.mode != "timeslice"
    return Limits(
        memory_mib=launch.memory_mib,
        cpu_milli=launch.cpu_milli,
        run_max_ms=launch.time_limit_ms + launch.stop_grace_ms + BACKSTOP_MS if has_backstop else 0,
        devices=_devices(grant, driver),
    )


def _devices(grant: PartitionGrant, driver: Path) -> tuple[str, ...] | None:
    """None: not restricted."""
    files = card_files(driver)
    if not files or grant.mode == "mig":
        return None
    cards = [uuid for uuid in grant.env.get("CUDA_VISIBLE_DEVICES", "").split(",") if uuid]
    if not all(uuid in files for uuid in cards):
        return None  # modelled, or named otherwise: a wrong guess would keep it from its own card
    own = [files[uuid] for uuid in cards]
    return (*own, *_present(_SHARED if cards else ()), *_present(_OTHERS))


def _present(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(path) for pattern in patterns for path in sorted(Path("/dev").glob(pattern)))


def card_files(driver: Path = DRIVER) -> dict[str, str]:
    """The device file of each card that the driver knows, by UUID."""
    found = {}
    try:
        folders = sorted(driver.iterdir())
    except OSError:
        return {}
    for folder in folders:
        try:
            lines = (folder / "information").read_text().splitlines()
        except OSError:
            continue
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "GPU UUID" in facts and facts.get("Device Minor", "").isdigit():
            found[facts["GPU UUID"]] = f"/dev/nvidia{facts['Device Minor']}"
    return found
