"""YAML as its version 1.2 reads it: PyYAML without the guesses of 1.1.

PyYAML turns `1:30:00` into 5400, `no` into false and `2026-01-31` into a date. In a job file these are a time limit,
a name and a label. Anchors, tags and everything else stay as they are; nothing but plain data can come out.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

YamlError = yaml.YAMLError


class _Loader(yaml.SafeLoader):
    """Starts with no resolver at all; those below are its own."""


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])


def described(error: Exception) -> str:
    """In one line: where, and what is wrong there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    where = f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    begun = error.context_mark
    since = f" {error.context} that began in line {begun.line + 1}" if error.context and begun is not None else ""
    return f"{where}: {error.problem}{since}"


def load_documents(text: str) -> list[Any]:
    """Every document of the text; `YamlError` if it is no YAML."""
    return list(yaml.load_all(text, Loader=_Loader))
