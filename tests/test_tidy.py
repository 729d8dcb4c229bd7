"""The house style, enforced: sizes, docstrings, no promises in comments, and documents that name only what exists."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpuyard.cli.app import build_app

ROOT = Path(__file__).parents[1]
PACKAGES = ("protocol/gpuyard_protocol", "client/gpuyard", "daemon/gpuyard_daemon", "agents/gpuyard_agent")
FOLDERS = (*PACKAGES, "bench", "tests", "docs", "systemd", ".ci")
MODULE_LINES_MAX = 600
TEST_LINES_MAX = 900
FUNCTION_LINES_MAX = 70
#: Words that put work off instead of doing it or writing it down as an issue.
PROMISES = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
#: Places of one person's machine.
MACHINE_PATHS = re.compile(r"(?<![\w.$}])/(?:root|work|Users|mnt)/\w")


def files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path
    for name in ("Makefile", "README.md", "CHANGELOG.md", "pyproject.toml"):
        yield ROOT / name


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules(*PACKAGES, "bench"), ids=place)
def test_a_module_says_what_it_is_and_stays_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MODULE_LINES_MAX, "split it: a module says one thing"
    if tree.body:
        assert ast.get_docstring(tree), "say what it decides and what it does not know"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", modules("tests"), ids=place)
def test_a_test_module_says_what_it_is_about(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= TEST_LINES_MAX
    if tree.body:
        assert ast.get_docstring(tree)


def test_nothing_is_put_off_in_comments_and_nothing_names_a_persons_machine() -> None:
    found = []
    for path in files():
        data = path.read_bytes()
        if b"\0" in data:  # built, not written
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
            if PROMISES.search(line) or MACHINE_PATHS.search(line):
                found.append(f"{place(path)}:{number}: {line.strip()}")
    assert found == []


def test_package_modules_have_names_that_say_something() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert [place(path) for path in modules(*PACKAGES) if path.stem in vague] == []


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_decision_stands_in_the_index() -> None:
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs" / "decisions").glob("0*.md")):
        number, title = path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ").split(". ", 1)
        assert f"{number}. [{title}]({path.name})" in index


@pytest.mark.parametrize("path", DOCUMENTS, ids=place)
def test_documents_name_only_targets_that_exist(path: Path) -> None:
    named = set(re.findall(r"(?:`|^\s*|&& )make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= make_targets()


@pytest.mark.parametrize("path", DOCUMENTS, ids=place)
def test_documents_name_only_commands_that_exist(path: Path) -> None:
    app = build_app()
    known = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    text = path.read_text(encoding="utf-8")
    shown = re.findall(r"(?:`|\$ |-- )gpuyard ([a-z]+)", text)
    assert set(shown) <= known


@pytest.mark.parametrize("path", DOCUMENTS, ids=place)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=place)
def test_documents_name_only_files_of_tests_that_exist(path: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", path.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_architecture_names_every_module_of_the_core() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    modules_of_core = [path.stem for path in modules("daemon/gpuyard_daemon/core") if path.stem != "__init__"]
    assert [name for name in modules_of_core if f"`{name}`" not in text] == []


def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = set(re.findall(r'echo "make ([a-z]+) ', makefile))
    assert make_targets() - listed == {"help", "venv"}


def test_the_script_of_the_build_server_is_valid() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)
