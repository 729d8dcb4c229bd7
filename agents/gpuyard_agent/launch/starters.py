"""What starts the processes of a replica that asked for a launcher.

`torchrun` starts one process for each card of the replica. It is told by variables (`environment`) how many there are
and where their peers are; here is only the command line. A program other than Python goes as it is.
"""

from __future__ import annotations

from gpuyard_protocol.nodes import Launch


def starter(launch: Launch) -> tuple[str, ...]:
    """What goes before the replica's own command; nothing where it asked for nothing."""
    if not launch.launcher:
        return ()
    first = launch.argv[0] if launch.argv and not launch.script else ""
    if first.endswith(".py") or first == "-m":
        return (launch.launcher,)
    return (launch.launcher, "--no-python")
