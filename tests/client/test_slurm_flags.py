"""Slurm's flags, and the jobs that they mean here."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpuyard.slurm.flags import in_script, job_of, parser
from gpuyard_protocol.codec import decode
from gpuyard_protocol.jobs import JobRequest


def meant(*words: str) -> dict[str, Any]:
    job = job_of(parser("sbatch").parse_args(words))
    # The yard takes whatever comes out.
    decode(JobRequest, msgspec.json.encode({"command": ["true"], **job})).specify()
    return job


@pytest.mark.parametrize(
    ("words", "job"),
    [
        (("-J", "train", "-p", "night", "-c", "4"), {"name": "train", "queue": "night", "cpus": "4"}),
        (("-t", "90"), {"time_limit": "5400s"}),
        (("-t", "1:30"), {"time_limit": "90s"}),
        (("-t", "01:00:05"), {"time_limit": "3605s"}),
        (("-t", "1-12"), {"time_limit": "129600s"}),
        (("-t", "1-00:30"), {"time_limit": "88200s"}),
        (("--mem", "2000"), {"memory": "2000Mi"}),
        (("--mem=16G",), {"memory": "16Gi"}),
        (("--gres=gpu:2",), {"gpus": 2}),
        (("--gres=gpu:A100:4",), {"gpus": 4, "gpu_model": "A100"}),
        (("--gres=gpu",), {"gpus": 1}),
        (("--gres=mps:50",), {"gpu": "50%"}),
        (("-N", "2", "--gpus-per-node=8"), {"replicas": 2, "gpus": 8}),
        (("-n", "4", "--gpus-per-task=h100:1"), {"replicas": 4, "gpus": 1, "gpu_model": "h100"}),
        (("-N", "2", "-G", "8"), {"replicas": 2, "gpus": 4}),
        (("-G", "12"), {"total_gpus": 12}),
        (("-a", "0-9%2", "-H"), {"array": "0-9%2", "hold": True}),
        (
            ("-J", "x", "-d", "afterok:1:2,singleton"),
            {"name": "x", "depends_on": ["afterok:1", "afterok:2", "singleton"]},
        ),
        (("--begin=now+2hours",), {"begin": "+2h"}),
        (("--export=A=1,B=x y",), {"env": {"A": "1", "B": "x y"}}),
        (("--export=NONE", "--comment", "mine", "-A", "physics"), {}),
        (("-w", "n1,n2", "-D", "/srv"), {"nodes": ["n1", "n2"], "cwd": "/srv"}),
    ],
)
def test_a_flag_means_a_field(words: tuple[str, ...], job: dict[str, Any]) -> None:
    assert meant(*words) == job


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--exclusive",), "--exclusive is not carried out here"),
        (("--gpus-per-nod=1",), "did you mean --gpus-per-node?"),
        (("--gres=shard:4",), "expected gpu:N"),
        (("-t", "soon"), "expected minutes"),
        (("--mem=lots",), "expected a number of megabytes"),
        (("-N", "2", "-n", "8"), "a replica is one task on one node"),
        (("-N", "2", "-G", "3"), "cannot be parted"),
        (("--gres=gpu:1", "-G", "1"), "say the same thing twice"),
        (("--export=ALL",), "nothing goes along unless it is named"),
    ],
)
def test_what_has_no_equal_is_refused_by_name(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        meant(*words)
    assert said in str(ended.value) + capsys.readouterr().err


def test_a_scripts_own_lines_end_with_its_first_command() -> None:
    text = "#!/bin/sh\n#SBATCH -J one --time=5  # five minutes\n\n# a remark\n#SBATCH -c 2\necho\n#SBATCH -J late\n"
    assert in_script(text) == ["-J", "one", "--time=5", "-c", "2"]
