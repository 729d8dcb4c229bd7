"""The command `gpuyard`: one module per group of commands, all of them thin over the SDK.

`main` is the one place where an error becomes a line on stderr and an exit code: 1 for what the yard or the machine
would not do, 2 for what was typed wrong, 130 for Ctrl-C. Commands raise; they do not print errors.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    from gpuyard.cli.app import build_app
    from gpuyard.errors import GpuyardError
    from gpuyard.slurm import NAMES, run_as

    try:
        if arguments is None and (name := Path(sys.argv[0]).name) in NAMES:
            run_as(name, sys.argv[1:])
            return
        build_app()(args=None if arguments is None else list(arguments), prog_name="gpuyard")
    except GpuyardError as error:
        fail(str(error))
    except BrokenPipeError:
        # Whoever read our output has gone (`gpuyard jobs | head`): nothing more to say, and nobody to say it to.
        sys.stderr.close()
        raise SystemExit(141) from None


def fail(text: str, code: int = 1) -> None:
    """Say what went wrong in one line, and end."""
    sys.stderr.write(f"gpuyard: {' '.join(text.split())}\n")
    raise SystemExit(code)
