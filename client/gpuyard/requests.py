"""What people hand in, made into requests: keyword arguments, dicts, and YAML or TOML files.

A job file holds one job, a list of jobs (YAML), several documents (YAML), or tables `[[jobs]]` / `[[services]]`
(TOML, or the same keys in YAML). Only the form is checked here; what the values mean is the yard's to judge, so that
one place decides.

YAML is read with the types of YAML 1.2: `1:30:00` is text and not the number 5400, `no` is text and not false.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from gpuyard.errors import GpuyardError, Rejected
from gpuyard_protocol.codec import Malformed, encode, from_plain
from gpuyard_protocol.jobs import JobRequest
from gpuyard_protocol.services import ServiceRequest

JobLike: TypeAlias = JobRequest | Mapping[str, Any]
ServiceLike: TypeAlias = ServiceRequest | Mapping[str, Any]
R = TypeVar("R", JobRequest, ServiceRequest)

#: Requests of `submit-many` go in messages of at most so many jobs and bytes.
BATCH_JOBS_MAX = 1000
BATCH_BYTES_MAX = 900 * 1024
#: Of a job file, about, with every alias replaced by what it stands for.
FILE_BYTES_MAX = 64 * 1024 * 1024


def job_request(request: JobLike | None, fields: Mapping[str, Any]) -> JobRequest:
    """`fields` on top of `request`; `Rejected` names what has the wrong form."""
    return _build(JobRequest, request, fields)


def service_request(request: ServiceLike | None, fields: Mapping[str, Any]) -> ServiceRequest:
    return _build(ServiceRequest, request, fields)


def _build(kind: type[R], request: R | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> R:
    if isinstance(request, kind) and not fields:
        return request
    plain = dict(request) if isinstance(request, Mapping) else _plain_of(request)
    try:
        return from_plain(kind, plain | dict(fields))
    except Malformed as error:
        raise Rejected.from_malformed(error) from None
    except TypeError as error:
        raise Rejected("Malformed", str(error)) from None


def _plain_of(request: JobRequest | ServiceRequest | None) -> dict[str, Any]:
    import msgspec

    return {} if request is None else dict(msgspec.json.decode(encode(request)))


def batches(requests: Iterable[JobRequest]) -> Iterable[list[JobRequest]]:
    """Consecutive requests, grouped so that each group fits one message."""
    group: list[JobRequest] = []
    size = 0
    for request in requests:
        length = len(encode(request)) + 1
        if group and (len(group) == BATCH_JOBS_MAX or size + length > BATCH_BYTES_MAX):
            yield group
            group, size = [], 0
        group.append(request)
        size += length
    if group:
        yield group


# --- files ------------------------------------------------------------------------------------------------------------


def read_items(path: str | Path, key: str) -> list[dict[str, Any]]:
    """The mappings of a file (`-`: standard input); `key`: the name of the list, where it has one."""
    name, text = _read_text(path)
    documents = _parse(name, text)
    items: list[dict[str, Any]] = []
    for document in documents:
        found = document.get(key) if isinstance(document, dict) and key in document else document
        if isinstance(document, dict) and key in document and len(document) > 1:
            extra = next(other for other in document if other != key)
            raise GpuyardError(f"{name}: {extra!r} stands beside {key!r}: a file with {key!r} holds nothing else")
        for item in found if isinstance(found, list) else [found]:
            if not isinstance(item, dict) or not all(isinstance(field, str) for field in item):
                raise GpuyardError(
                    f"{name}: found {item!r:.60}; expected fields and values, or a list of such under {key!r}"
                )
            items.append(_with_text_env(item))
    if not items:
        raise GpuyardError(f"{name} is empty: expected {key}")
    return items


def _read_text(path: str | Path) -> tuple[str, str]:
    if str(path) == "-":
        import sys

        return "standard input", sys.stdin.read()
    try:
        return str(path), Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise GpuyardError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise GpuyardError(f"{path} is no text in UTF-8: {error}") from None


def _parse(name: str, text: str) -> list[Any]:
    if name.endswith(".toml"):
        try:
            return [tomllib.loads(text)]
        except (ValueError, RecursionError) as error:
            raise GpuyardError(f"{name} is no TOML: {error}") from None
    from gpuyard.yaml12 import YamlError, described, load_documents

    try:
        documents = [document for document in load_documents(text) if document is not None]
    except (YamlError, ValueError, RecursionError) as error:
        raise GpuyardError(f"{name} is no YAML: {described(error)}") from None
    _check_size(name, documents)
    return documents


def _check_size(name: str, documents: list[Any]) -> None:
    """A few lines of YAML aliases can stand for more than there is memory, or for something without end."""
    left, waiting = FILE_BYTES_MAX, list(documents)
    while waiting:
        value = waiting.pop()
        left -= 16 + (len(value) if isinstance(value, str) else 0)
        if left < 0:
            raise GpuyardError(f"{name}: more than {FILE_BYTES_MAX} bytes, once its aliases are unfolded")
        if isinstance(value, dict):
            waiting.extend(value)
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def _with_text_env(item: dict[str, Any]) -> dict[str, Any]:
    """`env: {PORT: 80}` means the text `80`: a variable has no other type."""
    env = item.get("env")
    if not isinstance(env, dict):
        return item
    texts = {name: str(value) if type(value) is int else value for name, value in env.items()}
    return item | {"env": texts}
