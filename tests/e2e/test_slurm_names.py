"""The command under Slurm's names, as links beside each other, on a real yard."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.yard import Yard, running_yard


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=2, simulate="4xH100-80GB") as yard:
        program = yard.scratch / "gpuyard"
        program.write_text(f"#!{sys.executable}\nfrom gpuyard.cli import main\nmain()\n")
        program.chmod(0o755)
        for name in ("sbatch", "srun", "squeue", "scancel", "sinfo"):
            (yard.scratch / name).symlink_to(program)
        yield yard


def say(yard: Yard, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "GPUYARD_CONTEXT": str(yard.context), "NO_COLOR": "1"}
    command = [str(yard.scratch / name), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False, cwd="/")


def test_a_batch_script_runs_with_what_its_lines_ask_for(yard: Yard, tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(
        "#!/bin/sh\n#SBATCH -J train\n#SBATCH --gres=gpu:2 -t 10\n"
        f"echo $SLURM_JOB_ID $1 $SLURM_GPUS_ON_NODE > {yard.scratch}/said\n"
    )
    shown = say(yard, "sbatch", "-W", "--parsable", str(script), "fast")
    assert shown.returncode == 0, shown.stderr
    number = shown.stdout.strip()
    assert (yard.scratch / "said").read_text().split() == [number, "fast", "2"]
    assert say(yard, "sbatch", "--wrap", "exit 3", "--wait").returncode == 3
    assert say(yard, "sbatch", "--test-only", "--wrap", "true").stdout.startswith("sbatch: it would start at once on ")


def test_the_queue_and_the_nodes_are_shown_in_slurms_words(yard: Yard) -> None:
    shown = say(yard, "sbatch", "-J", "waits", "-H", "--wrap", "true")
    assert shown.stdout.startswith("Submitted batch job ")
    number = shown.stdout.split()[-1]
    listed = say(yard, "squeue", "--me")
    assert listed.returncode == 0, listed.stderr
    header, line = listed.stdout.splitlines()
    assert header.split()[:5] == ["JOBID", "PARTITION", "NAME", "USER", "ST"]
    assert line.split()[:3] == [number, "gpuyard", "waits"]
    assert "PD" in line.split()
    assert "(JobHeldUser: " in line
    assert say(yard, "squeue", "-h", "-t", "R").stdout == ""
    nodes = say(yard, "sinfo").stdout.splitlines()
    assert nodes[1].split() == ["gpuyard*", "up", "infinite", "2", "idle", "node-1,node-2"]
    assert say(yard, "scancel", number).returncode == 0
    assert say(yard, "squeue", "-h").stdout == ""
    assert say(yard, "scancel", "999999").returncode == 1


def test_srun_shows_the_output_and_ends_as_the_job_does(yard: Yard) -> None:
    shown = say(yard, "srun", "-N", "2", "--gpus-per-node=1", "sh", "-c", "echo rank $RANK; exit 4")
    assert sorted(shown.stdout.split("\n")) == ["", "[0] rank 0", "[1] rank 1"]
    assert shown.returncode == 4
    refused = say(yard, "srun", "--exclusive", "true")
    assert refused.returncode == 2
    assert "--exclusive is not carried out here" in refused.stderr
