"""The AsyncAPI document: complete, made from the types, and fresh."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuyard_protocol import asyncapi, subjects
from gpuyard_protocol.codec import Malformed, decode
from gpuyard_protocol.services import ServiceRequest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "asyncapi.yaml"


def test_the_committed_document_is_what_the_types_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == asyncapi.render(), "run: make docs"


@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_document_is_the_same_under_any_hash_seed(seed: str) -> None:
    command = [sys.executable, "-m", "gpuyard_protocol.asyncapi", "--check", str(DOCUMENT)]
    paths = os.pathsep.join([str(ROOT / "protocol"), *sys.path])
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}, check=True)


def test_a_stale_document_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "asyncapi.yaml"
    monkeypatch.setattr(sys, "argv", ["asyncapi", "--check", str(stale)])
    assert asyncapi.main() == 1
    monkeypatch.setattr(sys, "argv", ["asyncapi", "--write", str(stale)])
    assert asyncapi.main() == 0
    assert stale.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")


def test_every_subject_of_the_grammar_is_a_channel() -> None:
    """The table in the grammar's docstring is what people read first: nothing in it may be missing here."""
    addresses = {channel["address"] for channel in asyncapi.document()["channels"].values()}
    shapes = {re.sub(r"{\w+}", "<>", address) for address in addresses if address}
    table = re.findall(r"`([^`]+)`", (subjects.__doc__ or "").split("Who asks")[0])
    for written in table:
        wanted = re.sub(r"<(verb|kind)>", r"\\S+", re.escape(written).replace("<", "<").replace(">", ">"))
        pattern = re.compile(re.sub(r"<(?!verb|kind)\w+>", "<>", wanted))
        assert any(pattern.fullmatch(shape) for shape in shapes), written


def test_every_reference_leads_somewhere() -> None:
    document = asyncapi.document()

    def follow(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                target: Any = document
                for part in node["$ref"].removeprefix("#/").split("/"):
                    target = target[part]
            for value in node.values():
                follow(value)
        elif isinstance(node, list):
            for value in node:
                follow(value)

    follow(document)


def test_the_file_is_plain_yaml_that_says_the_same() -> None:
    read = yaml.safe_load(DOCUMENT.read_text(encoding="utf-8"))
    assert json.dumps(read) == json.dumps(asyncapi.document())


def test_fields_say_what_the_source_says_about_them() -> None:
    schemas = asyncapi.document()["components"]["schemas"]
    assert schemas["JobRequest"]["properties"]["gpus"]["description"] == "Whole cards per replica."
    assert schemas["ServiceRequest"]["properties"]["tiers"]["description"] == "Not honoured yet: refused by name."


def test_a_field_marked_as_not_honoured_is_refused_and_no_other() -> None:
    notes = asyncapi.field_notes(ServiceRequest)
    marked = {field for field, note in notes.items() if note.startswith("Not honoured yet")}
    assert "tiers" in marked
    assert "command" not in marked
    for field in marked:
        values = ('"1h"', "1", "true", '["x"]', '{"x": 1}')
        refusals = [_refusal(f'{{"name": "x", "command": "y", "{field}": {value}}}'.encode()) for value in values]
        assert any("not honoured yet" in refusal for refusal in refusals), field


def _refusal(data: bytes) -> str:
    try:
        decode(ServiceRequest, data).specify()
    except Malformed as error:
        return str(error)
    return ""
