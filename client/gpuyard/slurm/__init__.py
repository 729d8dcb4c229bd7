"""gpuyard under Slurm's names: `sbatch`, `srun`, `squeue`, `scancel`, `sinfo` as links to `gpuyard`.

    ln -s "$(command -v gpuyard)" ~/bin/sbatch

For hands and scripts that know Slurm. What these names have in common with Slurm's is carried out; what this yard has
no equal for is refused by name, never taken and ignored, but for a few flags that only tell (`--comment`), and output
files, which are answered with a remark. Everything else is `gpuyard`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

NAMES = ("sbatch", "srun", "squeue", "scancel", "sinfo")


def run_as(name: str, arguments: Sequence[str]) -> None:
    """Do what a command of Slurm's name would; ends with its exit code."""
    from gpuyard.slurm import listing, submitting

    match name:
        case "sbatch":
            submitting.sbatch(arguments)
        case "srun":
            submitting.srun(arguments)
        case "squeue":
            listing.squeue(arguments)
        case "scancel":
            listing.scancel(arguments)
        case _:
            listing.sinfo(arguments)
