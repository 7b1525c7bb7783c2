"""As much of the protobuf wire format as it takes to write a message."""

from collections.abc import Iterable

_VARINT, _FIXED64, _LENGTH = 0, 1, 2


def varint(number: int) -> bytes:
    """A number of up to 64 bits, seven at a time, the lowest first."""
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def integer(field: int, number: int) -> bytes:
    """A field of an integer type, or an enumeration."""
    return varint(field << 3 | _VARINT) + varint(number)


def fixed64s(field: int, numbers: Iterable[int]) -> bytes:
    """A repeated field of fixed64."""
    return b"".join(
        varint(field << 3 | _FIXED64) + number.to_bytes(8, "little") for number in numbers
    )


def message(field: int, *parts: bytes) -> bytes:
    """A field that is a message of its own."""
    data = b"".join(parts)
    return varint(field << 3 | _LENGTH) + varint(len(data)) + data


def string(field: int, text: str) -> bytes:
    """A field of text."""
    return message(field, text.encode(errors="replace"))
