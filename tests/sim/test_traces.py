"""Trace readers: every format, plain and gzipped, and what a broken file is told."""

import gzip
from xml.etree import ElementTree

import pytest
from typer import Typer
from typer.testing import CliRunner

from gpuyard_daemon.sim import commands
from gpuyard_daemon.sim.openb import read_asks, read_hosts
from gpuyard_daemon.sim.trace_files import TraceError, TraceMissing, locate
from gpuyard_daemon.sim.trace_jobs import model_restart_s, read_jobs
from gpuyard_daemon.sim.trace_requests import read_azure_llm, read_mooncake

JOBS = {
    "muri": "job_id,num_gpu,submit_time,iterations,model_name,iteration_time\n0,4,1000,100,vgg16,1000\n",
    "philly": "timestamp,duration,num_gpus,gpu_time,cluster\n2017-10-01 00:00:45,30.0,1,30.0,vc1\n",
    "chronus": "job_id,user,num_gpu,submit_time,duration,expect_time_list\n0,vc,4,12,2,9\n1,vc,0,12,2,9\n",
    "gpuyard": "job_id,submit_s,gpus,duration_s,tenant\na,5,2,60,acme\n",
}
SERVICE_S = {"muri": 101.5, "philly": 30.0, "chronus": 120.0, "gpuyard": 60.0}


@pytest.mark.parametrize("file_format", JOBS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_job_format_is_read(tmp_path, file_format, zipped):
    path = tmp_path / "jobs.csv"
    text = JOBS[file_format].encode()
    path.write_bytes(gzip.compress(text) if zipped else text)
    (job,) = read_jobs(path, file_format)
    assert job.submit_s == 0
    assert job.service_s == pytest.approx(SERVICE_S[file_format])


def test_a_broken_cell_is_named_with_file_line_and_column(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text("job_id,submit_s,gpus,duration_s,tenant\na,0,1,9,t\nb,0,many,9,t\n")
    with pytest.raises(TraceError, match=r"jobs.csv, line 3, column gpus: found 'many'; expected a whole number"):
        read_jobs(path, "gpuyard")


def test_a_missing_column_is_named(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text("job_id,gpus\na,1\n")
    with pytest.raises(TraceError, match="no column submit_s, duration_s, tenant"):
        read_jobs(path, "gpuyard")


def test_openb_nodes_and_pods(tmp_path):
    nodes, pods = tmp_path / "nodes.csv", tmp_path / "pods.csv"
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\na,1000,1,2,T4\nb,1000,1,0,\n")
    pods.write_text("name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec\np,500,1,1,460,T4|A10\nq,500,1,0,0,\n")
    assert [host.gpus for host in read_hosts(nodes)] == [2]
    assert [ask.models for ask in read_asks(pods)] == [("A10", "T4"), ()]
    pods.write_text("name,cpu_milli,memory_mib,num_gpu,gpu_milli\np,500,1,2,460\n")
    with pytest.raises(TraceError, match="line 2, column gpu_milli"):
        read_asks(pods)


def test_inference_traces(tmp_path):
    azure, mooncake = tmp_path / "a.csv", tmp_path / "m.jsonl"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n")
    mooncake.write_text('{"timestamp": 500, "input_length": 7, "output_length": 3, "hash_ids": []}\n')
    assert read_azure_llm(azure)[0].generated_tokens == 44
    assert read_mooncake(mooncake)[0].at_s == 0
    mooncake.write_text("{}\n")
    with pytest.raises(TraceError, match="line 1"):
        read_mooncake(mooncake)


def test_a_missing_file_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("GPUYARD_TRACES", raising=False)
    with pytest.raises(TraceMissing, match="Rivendile/Muri"):
        locate("muri/trace1.csv", "muri")
    (tmp_path / "jobs.csv.gz").write_bytes(gzip.compress(b"x"))
    assert locate("jobs.csv", "muri", str(tmp_path)).name == "jobs.csv.gz"


def test_restart_costs_grow_with_the_gang():
    assert [model_restart_s("vgg16", gpus) for gpus in (1, 4, 8, 32)] == [7, 8, 9, 10]
    assert model_restart_s("unheard-of", 1) == 10


def test_simulate_compares_policies_and_draws(tmp_path):
    path = tmp_path / "jobs.csv"
    lines = [f"{n},{n * 10},{1 + n % 4},{50 + n},t{n % 2}" for n in range(30)]
    path.write_text("job_id,submit_s,gpus,duration_s,tenant\n" + "\n".join(lines) + "\n")
    root = Typer()
    commands.register(root)
    root.callback()(lambda: None)
    runner = CliRunner()
    result = runner.invoke(
        root, ["simulate", str(path), "--nodes", "2", "--gpus-per-node", "4", "--plot", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert sorted(drawn) == [
        "allocation.svg", "fragmentation.svg", "jct.svg", "queue.svg", "tenants-fifo-skip.svg", "tenants-gpuyard.svg",
        "tenants-srsf.svg",
    ]  # fmt: skip
    for name, text in drawn.items():
        ElementTree.fromstring(text)
        assert text.count("<polyline") == (2 if name.startswith("tenants") else 3)
    refused = runner.invoke(root, ["simulate", str(tmp_path / "none.csv")])
    assert refused.exit_code == 2
