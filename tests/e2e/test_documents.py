"""What the documents print is what happens: commands and messages run on a real yard, configuration is read.

A `console` block is typed line by line, and what it shows must come out: numbers, times, ids and widths of columns may
be others, `…` stands for anything. Of `sh` blocks the lines of `gpuyard` are run, names of hosts and directories
replaced, and those of `nats` sent as the messages that they would send. What cannot run here (root's installation,
other hosts) is held against the commands' own flags.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import gpuyard
from gpuyard.cli.app import build_app
from gpuyard_agent import config as agent_config
from gpuyard_daemon import config as daemon_config
from support.yard import Yard, running_yard

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
DOCUMENTS = [README, *sorted(DOCS.glob("*.md"))]
SHOWN_WITHIN_S = 20.0
#: They look, and may be asked again until what is shown has come about.
LOOKS = ("gpuyard jobs", "gpuyard why", "gpuyard services", "gpuyard nodes")
#: Bring the yard up, or belong to another machine.
ELSEWHERE = ("pip ", "gpuyard up", "make ")
#: What stands for a host, a directory or a file of the reader's.
STANDS_FOR = {"gpu-7": "node-2", "node-3": "node-1", "node-7": "node-2", "trial.toml": "daemon/daemon.toml"}


class Block(NamedTuple):
    kind: str
    text: str


class Shown(NamedTuple):
    """A command as it is printed, and what is printed below it."""

    command: str
    output: list[str]


def blocks(path: Path, *kinds: str) -> list[Block]:
    fences = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(kind, textwrap.dedent(text)) for kind, text in fences if kind in kinds]


def sessions(path: Path) -> list[Shown]:
    """Of all `console` blocks, in their order."""
    found: list[Shown] = []
    for block in blocks(path, "console"):
        for line in block.text.splitlines():
            if line.startswith("$ "):
                found.append(Shown(line.removeprefix("$ "), []))
            else:
                found[-1].output.append(line)
    return found


def lines_of(path: Path, program: str) -> list[str]:
    """Lines of `sh` blocks that begin with a program, continued lines and open quotations joined."""
    found: list[str] = []
    for block in blocks(path, "sh", ""):
        open_line = ""
        for line in block.text.replace("\\\n", " ").splitlines():
            open_line += line
            if open_line.partition(" #")[0].count("'") % 2 == 0:
                found.append(open_line)
                open_line = ""
    return [line for line in found if line.startswith(f"{program} ")]


# --- on a yard -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    """As the README brings it up."""
    with running_yard(nodes=2, simulate="8xH100-80GB", flags=("--user", "alice")) as yard:
        yield equipped(yard)


@pytest.fixture(scope="module")
def small_yard() -> Iterator[Yard]:
    """As `why.md` has it."""
    with running_yard(nodes=2, simulate="4xH100-80GB", flags=("--user", "alice")) as yard:
        yield equipped(yard)


def equipped(yard: Yard) -> Yard:
    program = yard.scratch / "gpuyard"
    program.write_text(f"#!{sys.executable}\nfrom gpuyard.cli import main\nmain()\n")
    program.chmod(0o755)
    return yard


def typed(yard: Yard, command: str) -> subprocess.CompletedProcess[str]:
    """As somebody would type it who stands in a directory of their own."""
    env = {
        **os.environ,
        "PATH": f"{yard.scratch}:{os.environ['PATH']}",
        "GPUYARD_CONTEXT": str(yard.context),
        "NO_COLOR": "1",
    }
    return subprocess.run(
        ["bash", "-c", command], env=env, cwd=yard.scratch, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip


def plain(line: str) -> str:
    """A line without what differs from time to time."""
    line = re.sub(r"\b(GPU|MIG)-[0-9a-f-]{36}\b", r"\1-ID", line)
    line = re.sub(r"(?:\b\d+(?:\.\d+)?(?:ms|[smhd]))+\b", "TIME", line)
    return " ".join(re.sub(r"\d+(\.\d+)?", "N", line).split())


def agrees(shown: list[str], said: str) -> bool:
    """Whether all lines that are shown are said; `…` stands for what is left out, within a line or for whole ones."""
    pattern = "".join(
        r"(?:.*\n)*" if line.strip() == "…" else r"[^\n]*".join(map(re.escape, plain(line).split("…"))) + r"\n"
        for line in shown
    )
    return re.fullmatch(pattern, "".join(f"{plain(line)}\n" for line in said.splitlines())) is not None


def show(yard: Yard, path: Path) -> None:
    """Type all that a document's sessions type, and see what they show."""
    for shown in sessions(path):
        if shown.command.startswith(ELSEWHERE):
            continue
        if shown.command.startswith("cat "):
            (yard.scratch / shown.command.removeprefix("cat ")).write_text("\n".join(shown.output) + "\n")
            continue
        until = time.monotonic() + SHOWN_WITHIN_S
        done = typed(yard, shown.command)
        while shown.command.startswith(LOOKS) and not agrees(shown.output, done.stdout) and time.monotonic() < until:
            done = typed(yard, shown.command)
        assert "Traceback" not in done.stdout
        if shown.output:
            assert agrees(shown.output, done.stdout), f"$ {shown.command}\n{done.stdout}\nand not\n" + "\n".join(
                shown.output
            )
        else:
            assert done.returncode == 0, f"$ {shown.command}\n{done.stdout}"


def test_the_readmes_tour_is_what_happens(yard: Yard) -> None:
    up = next(shown for shown in sessions(README) if shown.command.startswith("gpuyard up"))
    announced = next(
        line for line in (yard.state.parent / "up.log").read_text().splitlines() if line.startswith("The yard is up")
    )
    account = re.compile(r"jobs run as \w+")
    assert plain(account.sub("", announced)) == plain(account.sub("", up.output[0]))
    show(yard, README)


def test_a_job_file_and_the_sdk_do_what_the_readme_says(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    [job] = blocks(README, "yaml")
    (yard.scratch / "job.yaml").write_text(job.text)
    [mention] = re.findall(r"`(gpuyard submit -f [\w.]+)`", README.read_text(encoding="utf-8"))
    assert typed(yard, mention).stdout.startswith("Submitted job ")
    [program] = blocks(README, "python")
    (yard.scratch / "sdk.py").write_text(
        "import asyncio\nimport gpuyard\n\n\nasync def work():\n"
        + textwrap.indent(program.text, "    ")
        + "\n\nasyncio.run(work())\n"
    )
    done = typed(yard, f"{sys.executable} sdk.py")
    # Whether there is a train.py, or a `python` for its account, is the reader's affair.
    assert done.stdout.strip() in ("succeeded", "failed"), done.stdout


def test_what_why_shows_is_what_happens(small_yard: Yard) -> None:
    show(small_yard, DOCS / "why.md")


def test_what_operators_type_works_on_a_running_yard(yard: Yard) -> None:
    commands = [*lines_of(DOCS / "operations.md", "gpuyard"), *_tenants_commands()]
    assert len(commands) >= 8
    for command in commands:
        words = [STANDS_FOR.get(word, word) for word in shlex.split(command, comments=True)]
        words = [re.sub(r"^node-3=", "node-1=", word).replace("/var/lib/gpuyard", str(yard.state)) for word in words]
        if "daemon/daemon.toml" in words:
            words[words.index("daemon/daemon.toml")] = str(yard.daemon_settings)
        if words[1] == "replay":
            words.insert(2, str(yard.state))
        if words[1] == "tenants" and "--state" not in words:
            words += ["--state", str(yard.state)]
        done = typed(yard, shlex.join(words))
        assert done.returncode == 0, f"$ {shlex.join(words)}\n{done.stdout}"


def _tenants_commands() -> list[str]:
    """Those of the installation; a key that somebody made herself is not at hand."""
    return [
        line
        for line in lines_of(DOCS / "install.md", "gpuyard")
        if line.startswith("gpuyard tenants") and "--public-key" not in line
    ]


async def test_messages_sent_by_hand_are_understood(yard: Yard) -> None:
    sent = 0
    bus = await yard.tenant_bus()
    try:
        for line in [line for path in DOCUMENTS for line in lines_of(path, "nats")]:
            words = shlex.split(line, comments=True)
            if words[1] not in ("req", "pub"):
                continue
            subject, payload = words[2], words[3].encode()
            sent += 1
            if words[1] == "pub":
                await bus.publish(subject, payload)
                continue
            answer = json.loads((await bus.request(subject, payload, timeout=10)).data)
            if subject.startswith("sub."):
                answer = await _decided(yard, f"s{answer['seq']}")
            assert "Malformed" not in json.dumps(answer), f"{line}\n{answer}"
    finally:
        await bus.close()
    assert sent >= 12


async def _decided(yard: Yard, submission: str) -> Any:
    """What became of a request, however it was decided."""
    until = time.monotonic() + SHOWN_WITHIN_S
    async with yard.connect() as client:
        while time.monotonic() < until:
            try:
                answer = await client.submission(submission)
            except gpuyard.GpuyardError:
                continue
            if answer is not None:
                return {"reason": answer.reason.code if answer.reason else ""}
    raise AssertionError(f"{submission} was never decided")


# --- by themselves ---------------------------------------------------------------------------------------------------


def test_configuration_in_documents_is_read_by_whom_it_is_for(tmp_path: Path) -> None:
    for path, read in (("operations.md", daemon_config.load), ("install.md", agent_config.load)):
        found = blocks(DOCS / path, "toml")
        assert found
        for block in found:
            file = tmp_path / f"{path}.toml"
            file.write_text(block.text)
            read(file, {"nats": "nats://head:4222", "node": "gpu-1"} if path == "install.md" else {})


def mentions(path: Path) -> list[str]:
    """Every command line of ours in a document, in blocks and in running text."""
    text = path.read_text(encoding="utf-8")
    inline = re.findall(
        r"`(gpuyard [a-z][^`]*)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    )
    shown = [shown.command for shown in sessions(path)]
    found = [*inline, *lines_of(path, "gpuyard"), *(line for line in shown if line.startswith("gpuyard "))]
    return [" ".join(line.split()) for line in found]


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_documents_name_only_flags_that_their_commands_have(path: Path) -> None:
    import typer.main

    root: Any = typer.main.get_command(build_app())
    wrong = []
    for line in mentions(path):
        command, *_ = re.split(r" -- | [#|] ", line)
        words = command.split()[1:]
        place = root
        while words and words[0] in getattr(place, "commands", {}):
            place = place.commands[words.pop(0)]
        known = {name for option in (*place.params, *root.params) for name in (*option.opts, *option.secondary_opts)}
        named = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        wrong += [f"{line}: {name}" for name in named if name not in known | {"--help", "-h"}]
        if hasattr(place, "commands") and words and not words[0].startswith(("-", "…", "|")) and place is not root:
            wrong.append(f"{line}: {words[0]}" if re.fullmatch(r"[a-z-]+", words[0]) else "")
    assert [each for each in wrong if each] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_benchmarks_and_flags_that_exist(path: Path) -> None:
    for module, rest in re.findall(
        r"`python -m ((?:bench|faults|support)\.\w+)([^`]*)`", path.read_text(encoding="utf-8")
    ):
        folder = ROOT if module.startswith("bench") else ROOT / "tests"
        file = folder.joinpath(*module.split(".")).with_suffix(".py")
        assert file.is_file(), module
        source = "".join(each.read_text(encoding="utf-8") for each in sorted(file.parent.glob("*.py")))
        assert [flag for flag in re.findall(r"--[a-z][a-z-]*", rest) if f'"{flag}"' not in source] == [], module
