"""Bytes ⇄ messages. Decoding is validation, and its error names the path, what was found and what was expected.

Tenants' requests refuse unknown fields, so that a typing error is told and not ignored (their types say so with
`forbid_unknown_fields`). Between daemon and agents, and in the journal, unknown fields are skipped: neighbours in
version must understand each other.

Whatever arrives, the outcome is a message or a `Malformed`; nothing else is raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import inspect as shapes

from gpuyard_protocol.names import nearest
from gpuyard_protocol.units import Cpus, GpuWish, MigProfile, Moment, Quantity, Share

T = TypeVar("T")

#: What a tenant's request may say in `v`: the yard does not guess at what later versions mean.
RequestVersion: TypeAlias = Literal[1]

#: Requests longer than this are refused unread. SUB itself stores at most this much a message.
MAX_REQUEST_BYTES = 256 * 1024
#: `submit-many` carries up to 1,000 jobs in one message.
MAX_BATCH_BYTES = 1024 * 1024
_FOUND_CHARS_MAX = 80


class Malformed(Exception):
    """A message that is not what it should be.

    `path` is a JSON path (`$.gpu_memory`), `found` what stood there (shortened), `expected` what is allowed.
    """

    def __init__(self, path: str, found: str, expected: str, near: str = "") -> None:
        path, found = _shorten(path), _shorten(found)
        hint = f" (did you mean {near!r}?)" if near else ""
        super().__init__(f"{path}: found {found}; expected {expected}{hint}")
        self.path = path
        self.found = found
        self.expected = expected
        self.nearest = near


def encode(message: object) -> bytes:
    """JSON with fields in their declared order: equal messages give equal bytes."""
    return _ENCODER.encode(message)


def decode(kind: type[T], data: bytes, *, max_bytes: int = MAX_REQUEST_BYTES) -> T:
    """The message, or `Malformed`."""
    if len(data) > max_bytes:
        raise Malformed("$", f"{len(data)} bytes", f"at most {max_bytes} bytes")
    try:
        decoder: msgspec.json.Decoder[T] = _decoder(kind)
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _explain(kind, data, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Malformed("$", _shorten(data), f"JSON text in UTF-8 ({error})") from None


def to_plain(message: object) -> Any:
    """A message as dicts, lists and numbers, for `--json` output and YAML files."""
    return msgspec.to_builtins(message, enc_hook=_encode_extra, str_keys=True)


def from_plain(kind: type[T], plain: object) -> T:
    """The reverse of `to_plain`, validated; `Malformed` names what is wrong."""
    try:
        data = encode(plain)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise Malformed("$", type(plain).__name__, f"what JSON can say ({error})") from None
    return decode(kind, data, max_bytes=MAX_BATCH_BYTES)


def _encode_extra(value: object) -> object:
    if isinstance(value, Quantity | MigProfile | GpuWish | Moment):
        return str(value)
    raise TypeError(f"no JSON form for {type(value).__name__}")


def _decode_extra(kind: type[Any], value: object) -> object:
    if issubclass(kind, Quantity | MigProfile | GpuWish | Moment):
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return kind.parse(value)
        raise ValueError(f"found {value!r}; expected {kind.EXPECTED}")
    raise TypeError(f"no decoder for {kind.__name__}")


_ENCODER = msgspec.json.Encoder(enc_hook=_encode_extra)


_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {}


def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind, dec_hook=_decode_extra)
    return decoder


#: The complaint and where: a text of the sender's that looks like a path is not taken for one.
_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in `)?(?P<path>\$[^`]*)`+)?$", re.DOTALL)
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$")
_OWN = re.compile(r"^found (?P<found>.*); expected (?P<expected>.*)$", re.DOTALL)
_EXPECTED = re.compile(r"^Expected (?P<kinds>`[^`]*`|\S+)(?P<bound>.*?)(?:, got .*)?$", re.DOTALL)
_SPOKEN = {
    "int": "an integer", "float": "a number", "str": "text", "bool": "true or false", "null": "null",
    "object": "an object", "array": "a list", "bytes": "Base64 text",
}  # fmt: skip


def _explain(kind: type[Any], data: bytes, complaint: str) -> Malformed:
    match = _AT.match(complaint)
    what, path = (match["what"], match["path"] or "$") if match else (complaint, "$")
    if unknown := _UNKNOWN.match(what):
        name = _shorten(unknown["name"])
        fields = _field_names(_shape_at(kind, path))
        return Malformed(f"{path}.{name}", "an unknown field", f"one of: {', '.join(fields)}", nearest(name, fields))
    if missing := _MISSING.match(what):
        return Malformed(f"{path}.{missing['name']}", "nothing", "a value: the field is required")
    if own := _OWN.match(what):
        return Malformed(path, own["found"], own["expected"])
    found = _value_at(data, path)
    if what.startswith("Invalid enum value") and (
        words := [word for word in _words_allowed(_shape_at(kind, path)) if word]
    ):
        return Malformed(path, found, f"one of: {', '.join(words)}", nearest(found.strip('"'), words))
    if expected := _EXPECTED.match(what):
        kinds = (_SPOKEN.get(name.strip(), name.strip()) for name in expected["kinds"].strip("`").split("|"))
        return Malformed(path, found, " or ".join(kinds) + expected["bound"])
    return Malformed(path, found, f"a value the field can hold ({what})")


#: One step of a JSON path: `.name`, `[3]`, or `[...]` for some value of an object.
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


def _shape_at(kind: Any, path: str) -> tuple[shapes.Type, ...]:
    """What may stand at a JSON path of a message: the members of a union, empty where the path leads nowhere."""
    current = _members(shapes.type_info(kind))
    for name, _ in _STEP.findall(path[1:]):
        inner: list[shapes.Type] = []
        for shape in current:
            if isinstance(shape, shapes.StructType):
                inner += [field.type for field in shape.fields if field.encode_name == name]
            elif isinstance(shape, shapes.ListType | shapes.VarTupleType):
                inner.append(shape.item_type)
            elif isinstance(shape, shapes.DictType):
                inner.append(shape.value_type)
        current = tuple(member for shape in inner for member in _members(shape))
    return current


def _members(shape: shapes.Type) -> tuple[shapes.Type, ...]:
    return shape.types if isinstance(shape, shapes.UnionType) else (shape,)


def _field_names(current: tuple[shapes.Type, ...]) -> list[str]:
    structs = (shape for shape in current if isinstance(shape, shapes.StructType))
    return list(dict.fromkeys(field.encode_name for struct in structs for field in struct.fields))


def _words_allowed(current: tuple[shapes.Type, ...]) -> list[str]:
    literals = (shape for shape in current if isinstance(shape, shapes.LiteralType))
    return [str(value) for literal in literals for value in literal.values]


def _value_at(data: bytes, path: str) -> str:
    """What stands at a JSON path of raw bytes, for an error message; the whole text if it cannot be followed."""
    try:
        value: Any = msgspec.json.decode(data)
        for name, index in _STEP.findall(path[1:]):
            if index == "...":  # the path does not say which value of the object
                break
            value = value[int(index)] if index else value[name]
        return msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, UnicodeError, RecursionError, LookupError, TypeError, ValueError, OverflowError):
        return _shorten(data)


def _shorten(found: str | bytes) -> str:
    """Fit for a log line, a terminal and an event: printable, and not the sender's whole message."""
    text = found[: 4 * _FOUND_CHARS_MAX]
    text = text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else text
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return text if len(text) <= _FOUND_CHARS_MAX else text[: _FOUND_CHARS_MAX - 1] + "…"


def json_schemas(kinds: Iterable[type[Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """JSON Schemas of message types: one reference each, and the definitions they share."""
    references, components = msgspec.json.schema_components(
        kinds, schema_hook=_schema_extra, ref_template="#/components/schemas/{name}"
    )
    return list(references), dict(components)


def _schema_extra(kind: type[Any]) -> dict[str, Any]:
    if issubclass(kind, Share | Cpus):
        return {"type": ["string", "number"], "description": kind.EXPECTED}
    if issubclass(kind, Quantity | MigProfile | GpuWish | Moment):
        return {"type": "string", "description": kind.EXPECTED}
    raise TypeError(f"no schema for {kind.__name__}")
