"""Finds libvfio-user, loads it and declares its functions."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from vfio_user import abi
from vfio_user.errors import LibraryError, LibraryNotFound

ENVIRONMENT_VARIABLE = "VFIO_USER_LIBRARY"
SYSTEM_NAMES = ("libvfio-user.so.0", "libvfio-user.so")


class Candidate(NamedTuple):
    """A place where the library may be: a path, or a name that the dynamic linker resolves."""

    name: str
    origin: str


def cache_directory() -> Path:
    """The directory in which `scripts/setup` keeps what it built."""
    if override := os.environ.get("VIOMMU_CACHE"):
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "viommu"


def candidates() -> Iterator[Candidate]:
    """Where the library may be, in the order of preference.

    A path in the environment leaves no other choice.
    """
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        yield Candidate(chosen, f"${ENVIRONMENT_VARIABLE}")
        return
    for name in SYSTEM_NAMES:
        yield Candidate(name, "system")
    built = cache_directory() / "libvfio-user" / "lib"
    for path in sorted(built.glob("libvfio-user.so*")):
        yield Candidate(str(path), "scripts/setup")


class Library:
    """A loaded libvfio-user.

    `call` holds the functions with their C names, each with argument and result types; after a
    failure `ctypes.get_errno()` is the errno. They take what C takes: a NULL context, an interrupt
    before `vfu_realize_ctx` or a scatter list of no entries ends the process.

    `api` is (0, 1) or (0, 2), see `vfio_user.abi`; `origin` says how the library was found.
    """

    def __init__(self, name: str, origin: str = "given") -> None:
        """Load the library `name`.

        Raises OSError if the dynamic linker refuses it, `LibraryNotFound` if it is something else.
        """
        self.call: Any = ctypes.CDLL(name, use_errno=True)
        self.name = name
        self.origin = origin
        old = hasattr(self.call, "vfu_get_migr_register_area_size")
        self.api = (0, 1) if old else (0, 2)
        for function, (result, arguments) in (abi.API_0_1 if old else abi.API_0_2).items():
            try:
                entry = getattr(self.call, function)
            except AttributeError:
                raise LibraryNotFound(
                    f"{name} has no function {function}, so it is no libvfio-user with API 0.1 or "
                    f"0.2; name another in {ENVIRONMENT_VARIABLE}, or remove it and run scripts/setup"
                ) from None
            entry.restype = result
            entry.argtypes = arguments

    @classmethod
    def load(cls) -> Self:
        """Load the first found of `$VFIO_USER_LIBRARY`, the system's, that of `scripts/setup`.

        Raises `LibraryNotFound`; the message names what to do, and each place with its reason.
        """
        reasons = []
        for name, origin in candidates():
            try:
                return cls(name, origin)
            except OSError as error:
                reasons.append(f"{origin}: {error}")
        looked = "; ".join(reasons)
        if ENVIRONMENT_VARIABLE in os.environ:
            raise LibraryNotFound(f"cannot load the libvfio-user of {looked}")
        raise LibraryNotFound(
            f"libvfio-user not found: run scripts/setup, which builds it into {cache_directory()}, "
            f"or name a copy in {ENVIRONMENT_VARIABLE} (tried {looked})"
        )

    def check(self, function: str, *arguments: object) -> int:
        """Call `function` and return its result. Raises `LibraryError` where that is negative."""
        result: int = getattr(self.call, function)(*arguments)
        if result < 0:
            raise LibraryError(function, ctypes.get_errno())
        return result
