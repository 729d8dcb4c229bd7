"""`python -m gpuyard_daemon`: reads what the process needs, and no more; the process itself is `process`."""

from __future__ import annotations

from collections.abc import Sequence

from gpuyard_protocol.bus.deferred import absent


def main(arguments: Sequence[str] | None = None) -> None:
    with absent("rich"):
        # It colours errors on a terminal, and to read it takes a fifth of the time that a start takes to read anything.
        import structlog as structlog
    from gpuyard_daemon import process

    process.main(arguments)


if __name__ == "__main__":
    main()
