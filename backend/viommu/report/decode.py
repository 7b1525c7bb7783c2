"""An event in words: the names and values of its fields, as a person wants to read them."""

from collections.abc import Iterator
from typing import Any

from viommu.report.model import Record

_HIDDEN = {"kind", "seq", "time"}
_HEXADECIMAL = {
    "stream_id", "substream_id", "iova", "address", "first", "value", "begin", "end_incl",
    "destination", "error_address", "ttb0", "ttb1", "s2_ttb", "stag",
}  # fmt: skip
_LONGEST = 2000  # characters; what a guest had a say in has no other bound

Pairs = list[tuple[str, str]]


def decode(record: Record) -> Pairs:
    """The fields of an event; a structure that it carries as text is taken apart."""
    pairs: Pairs = []
    for name, value in record.items():
        if name == "text" and isinstance(value, str) and value.startswith("0x"):
            pairs += _structure(value)
        elif name == "event" and isinstance(value, dict):  # of the host's SMMU
            pairs += [("kind", str(value.get("kind"))), *decode(value)]
        elif name not in _HIDDEN:
            pairs.append((name, _written(name, value)[:_LONGEST]))
    return pairs


def _written(name: str, value: Any) -> str:
    match value:
        case None:
            return "—"
        case bool():
            return "yes" if value else "no"
        case int() if name in _HEXADECIMAL:
            return f"{value:#x}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def _structure(text: str) -> Iterator[tuple[str, str]]:
    """The fields of what `Layout` writes as `0x… (name=value flag …)`."""
    raw, _, fields = text.partition(" (")
    yield "raw", raw
    for field in fields.rstrip(")").split():
        name, _, value = field.partition("=")
        yield f"· {name}", value or "1"
