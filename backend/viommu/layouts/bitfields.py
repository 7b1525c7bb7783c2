"""One idiom for everything that is a row of bits.

    class GlobalBypass(Layout, size=4):
        abort = bits(20, kind=bool)
        update = bits(31, kind=bool)

Overlapping or out-of-range fields fail when the class is made; a value that does not fit fails when it is assigned.
"""

from enum import IntEnum
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

T = TypeVar("T", bound=int)
E = TypeVar("E", bound=IntEnum)


class LayoutError(ValueError):
    """A layout declares overlapping fields, or a value does not fit its field."""


class Bits(Generic[T]):
    """One field of a `Layout`: a descriptor over bits `high` to `low` of the whole structure.

    Reading gives `kind(raw) * scale`. An `IntEnum` kind gives the bare number where the value has no name, because a
    guest may write any. Assigning takes a multiple of `scale` that fits, else raises `LayoutError`.
    """

    def __init__(self, high: int, low: int, kind: type[T], scale: int) -> None:
        if not 0 <= low <= high:
            raise LayoutError(f"bits {high}:{low} are not a field")
        self.high, self.low, self.kind, self.scale = high, low, kind, scale
        self.mask = (1 << (high - low + 1)) - 1
        self._names: dict[int, Any] = (
            {int(m): m for m in kind} if issubclass(kind, IntEnum) else {0: False, 1: True}
        )
        self._plain = kind is int
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: "Layout", owner: type) -> T: ...
    def __get__(self, instance: "Layout | None", owner: type) -> Any:
        if instance is None:
            return self
        raw = (instance.value >> self.low) & self.mask
        return raw * self.scale if self._plain else self._names.get(raw, raw)

    def __set__(self, instance: "Layout", value: T) -> None:
        raw, rest = divmod(int(value), self.scale)
        if rest or not 0 <= raw <= self.mask:
            width = self.high - self.low + 1
            raise LayoutError(
                f"{type(instance).__name__}.{self.name}: {int(value):#x} does not fit {width} bits"
                + (f" in units of {self.scale}" if self.scale > 1 else "")
            )
        instance.value = instance.value & ~(self.mask << self.low) | raw << self.low


@overload
def bits(high: int, low: int | None = None, *, kind: type[bool]) -> Bits[bool]: ...
@overload
def bits(high: int, low: int | None = None, *, kind: type[E]) -> Bits[E]: ...
@overload
def bits(high: int, low: int | None = None, *, scale: int = 1) -> Bits[int]: ...
def bits(high: int, low: int | None = None, *, kind: type[Any] = int, scale: int = 1) -> Bits[Any]:
    """Declare the field at bits `high` to `low` (one bit when `low` is left out)."""
    return Bits(high, high if low is None else low, kind, scale)


class Layout:
    """A structure of `size` bytes, little-endian, held as one integer in `value`.

    Fields are class attributes made by `bits`; they are keyword arguments of the constructor too.
    """

    size: ClassVar[int]
    fields: ClassVar[dict[str, Bits[Any]]] = {}
    __slots__ = ("value",)

    def __init_subclass__(cls, *, size: int | None = None) -> None:
        if size is not None:
            cls.size = size
        taken = 0
        cls.fields = {}
        for base in reversed(cls.__mro__):
            for name, field in vars(base).items():
                if not isinstance(field, Bits):
                    continue
                place = field.mask << field.low
                if field.high >= cls.size * 8:
                    raise LayoutError(f"{cls.__name__}.{name} lies outside its {cls.size} bytes")
                if taken & place:
                    raise LayoutError(f"{cls.__name__}.{name} overlaps another field")
                taken |= place
                cls.fields[name] = field

    def __init__(self, value: int = 0, **fields: int) -> None:
        if not 0 <= value < 1 << (self.size * 8):
            raise LayoutError(f"{type(self).__name__}: {value:#x} does not fit {self.size} bytes")
        self.value = value
        for name, content in fields.items():
            if name not in self.fields:
                raise LayoutError(f"{type(self).__name__} has no field {name}")
            setattr(self, name, content)

    @classmethod
    def from_bytes(cls, data: "bytes | bytearray | memoryview") -> Self:
        """Decode the first `size` bytes of `data`, copied once: the guest may be writing them."""
        layout = cls.__new__(cls)
        layout.value = int.from_bytes(data[: cls.size], "little")  # fits: nothing to check
        return layout

    @classmethod
    def mask(cls) -> int:
        """The bits that belong to a field."""
        return sum(field.mask << field.low for field in cls.fields.values())

    def to_bytes(self) -> bytes:
        """The `size` bytes that lie in memory."""
        return self.value.to_bytes(self.size, "little")

    def qwords(self) -> list[int]:
        """The structure as 64-bit words, in the order of memory; one word when it is shorter."""
        return [
            self.value >> shift & 0xFFFF_FFFF_FFFF_FFFF for shift in range(0, self.size * 8, 64)
        ]

    def __int__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.value == self.value

    def __hash__(self) -> int:
        return hash((type(self), self.value))

    def as_dict(self) -> dict[str, int | str]:
        """Every field that is not zero: True, a number, or the name of an enumerated value."""
        found: dict[str, int | str] = {}
        for name in self.fields:
            value = getattr(self, name)
            if value:
                found[name] = value.name if isinstance(value, IntEnum) else value
        return found

    def __str__(self) -> str:
        """`0x… (config=S1_TRANSLATE valid …)`: every field that is not zero."""
        parts = [
            name if value is True else f"{name}={hex(value) if isinstance(value, int) else value}"
            for name, value in self.as_dict().items()
        ]
        return f"{self.value:#x} ({' '.join(parts)})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value:#x})"
