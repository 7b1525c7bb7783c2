"""What a user can choose. A field here is a flag, an ini key and a variable of the environment:

    kernel: Path | None    --viommu-kernel Image    viommu_kernel = Image    VIOMMU_KERNEL=Image

in this order of precedence: flag, environment, ini key. A field of `GuestOptions` is an argument of the marker
`viommu` and of `viommu_lab.rig` as well.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import pytest


@dataclass(frozen=True)
class GuestOptions:
    """What makes a guest. Tests that want the same share one."""

    machine: Annotated[str, "a machine of viommu by name, or a TOML file"] = "aarch64-virt"
    smmu: Annotated[str, "lines of TOML for the machine's [smmu] table"] = ""
    raw: Annotated[bool, "leave the SMMU to scripts, also where the kernel has a driver"] = False
    kernel: Annotated[Path | None, "a kernel image"] = None
    modules: Annotated[Path | None, "its lib/modules/<release>"] = None
    initramfs: Annotated[Path | None, "an initramfs"] = None
    disk: Annotated[Path | None, "a disk image (raw or .qcow2) for virtio_blk; stays as it is"] = (
        None
    )
    image: Annotated[str, "a kernel that `viommu setup --guest` provides"] = ""
    scripts: Annotated[
        Path | None, "a folder of Python files, beside viommu's own in /viommu/inside"
    ] = None
    append: Annotated[str, "more words for the kernel's command line"] = ""
    qemu: Annotated[Path | None, "a qemu-system-… with vfio-user-pci"] = None
    qemu_arguments: Annotated[str, "more arguments for it, as in a shell"] = ""
    ledger: Annotated[bool, "follow every stream from attach to detach"] = False
    faults: Annotated[Path | None, "a plan of what goes wrong on purpose, from the boot on"] = None
    seed: Annotated[int, "seed of the order in which devices take turns"] = 0


@dataclass(frozen=True)
class RunOptions:
    """What holds for a whole run."""

    guests: Annotated[int, "guests that are up at once, in each worker"] = 1
    artifacts: Annotated[Path | None, "a folder for the logs of tests that failed"] = None
    keep_going: Annotated[bool, "report what a guest did, but fail no test for it"] = False


Options = TypeVar("Options", GuestOptions, RunOptions)
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}


def declare(parser: pytest.Parser) -> None:
    """Let pytest know of all of them."""
    group = parser.getgroup("viommu", "guests behind an IOMMU")
    for options in (GuestOptions, RunOptions):
        for name, kind, what in _declared(options):
            flag, told = f"--viommu-{name.replace('_', '-')}", f"{what} [${_variable(name)}]"
            if kind is bool:
                group.addoption(flag, action="store_true", default=None, help=told)
            else:
                metavar = "N" if kind is int else "PATH" if kind == Path | None else "TEXT"
                group.addoption(flag, default=None, metavar=metavar, help=told)
            parser.addini(f"viommu_{name}", what, type="string", default="")


def chosen(config: pytest.Config, options: type[Options]) -> Options:
    """What the user chose. Raises `pytest.UsageError` that says what is wrong, and where it stands."""
    here = config.inipath.parent if config.inipath else config.rootpath
    values: dict[str, Any] = {}
    for name, kind, _ in _declared(options):
        key = f"viommu_{name}"
        for place, text, base in (
            (f"--viommu-{name.replace('_', '-')}", config.getoption(key), Path.cwd()),
            (_variable(name), os.environ.get(_variable(name)) or None, Path.cwd()),
            (key, config.getini(key) or None, here),
        ):
            if text is not None:
                values[name] = _value(place, name, kind, text, base)
                break
    return options(**values)


def changed(options: GuestOptions, changes: Mapping[str, Any], base: Path) -> GuestOptions:
    """The same with changes, whose relative paths begin at `base`. Raises `pytest.UsageError`."""
    kinds = {name: kind for name, kind, _ in _declared(GuestOptions)}
    for name in changes:
        if name not in kinds:
            raise pytest.UsageError(f"viommu: no option {name!r}; there is {', '.join(kinds)}")
    return replace(
        options,
        **{name: _value(name, name, kinds[name], each, base) for name, each in changes.items()},
    )


def _declared(options: type[Any]) -> Iterator[tuple[str, Any, str]]:
    """The name, the type and the help of each."""
    for name, hint in get_type_hints(options, include_extras=True).items():
        yield name, hint.__origin__, hint.__metadata__[0]


def _variable(name: str) -> str:
    return f"VIOMMU_{name.upper()}"


def _value(place: str, name: str, kind: Any, given: object, base: Path) -> Any:
    text = str(given)
    if kind is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise pytest.UsageError(f"{place}: {text!r} is neither true nor false")
        return text.lower() in _TRUE
    if kind is int:
        try:
            number = int(text, 0)
        except ValueError:
            raise pytest.UsageError(f"{place}: {text!r} is no number") from None
        if name == "guests" and number < 1:
            raise pytest.UsageError(f"{place}: {number} is too few, a test needs 1")
        return number
    if kind == Path | None:
        return None if given is None else base / text
    if name == "machine" and text.endswith(".toml"):
        return str(base / text)
    return text
