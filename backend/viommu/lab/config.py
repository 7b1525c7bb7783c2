"""The machines of the lab: one TOML file each, checked before anything starts."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from viommu.disks import ImageFormat
from viommu.lab.errors import ConfigError
from viommu.smmu.features import Features

Arch = Literal["aarch64", "x86_64"]
MODELS = ("smmuv3", "test-engine", "nvme")
_CLASS = re.compile(r"[^:]+:[^\W\d]\w*")
Seconds = Annotated[float, Field(gt=0, le=3600)]

# On q35 the chipset's own functions sit in slot 31.
_Q35_CHIPSET_SLOT = 31
# The pins of `virt`'s PCI bus are swizzled over this many interrupts.
_VIRT_INTERRUPTS = 4


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Device(_Strict):
    """A function that another process serves over vfio-user: on the root bus, or alone on a bus of its own."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,30}$")]
    model: str
    """One of `MODELS`, or a class of the user's own: `file.py:Class` beside the TOML file, `package.module:Class`."""
    slot: Annotated[int, Field(ge=1, le=31)]
    bus: Annotated[int, Field(ge=1, le=255)] | None = None
    """With it, a root port is in `slot`, and the function in slot 0 of that bus: it can be unplugged."""

    disk: Path | None = None
    """An image or a block device for an NVMe controller; beside the TOML file if it is not absolute."""
    disk_format: ImageFormat | None = None
    """Of `disk`, if its name does not say so."""
    snapshot: bool = False
    """`disk` stays as it is: what the guest writes is forgotten."""
    size_mib: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    """How large the disk is, if it is in RAM or has to be made."""
    write_cache: Literal["host", "volatile"] = "host"
    """Where a disk's writes wait for their flush: in the host's kernel, or in the server, and are lost with it."""

    options: dict[str, Any] = {}
    """What a class of the user's own is made with."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name == "control":
            raise ValueError("'control' is that of the control socket")
        return name

    @field_validator("disk")
    @classmethod
    def _beside(cls, disk: Path | None, info: ValidationInfo) -> Path | None:
        home = (info.context or {}).get("home")
        return disk if disk is None or home is None else home / disk

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: str, info: ValidationInfo) -> str:
        if model in MODELS:
            return model
        if not _CLASS.fullmatch(model):
            allowed = ", ".join(map(repr, MODELS))
            raise ValueError(
                f"{model!r} is wrong, it should be {allowed} or a class of yours: 'file.py:Class'"
            )
        home = (info.context or {}).get("home")
        return model if home is None or ".py:" not in model else str(home / model)

    @property
    def size(self) -> int | None:
        """`size_mib` in bytes."""
        return None if self.size_mib is None else self.size_mib << 20

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        wanted = self.model == "nvme"
        if wanted != (self.disk is not None or self.size_mib is not None):
            needs = "needs a disk or a size_mib" if wanted else "has neither disk nor size_mib"
            raise ValueError(f"a device of model '{self.model}' {needs}")
        if self.write_cache == "volatile" and self.disk is None:
            raise ValueError("a volatile write_cache needs a disk: the RAM is lost as a whole")
        if self.disk is None and (self.disk_format or self.snapshot):
            raise ValueError("disk_format and snapshot are of a disk, and there is none")
        if self.options and self.model in MODELS:
            raise ValueError(f"a device of model '{self.model}' has no options")
        return self

    @property
    def stream_id(self) -> int:
        """The function's requester ID, which the SMMU sees as StreamID (function 0)."""
        return self.slot << 3 if self.bus is None else self.bus << 8

    @property
    def address(self) -> str:
        """Where the guest finds it."""
        return f"{self.stream_id >> 8:02x}:{self.stream_id >> 3 & 31:02x}.0"


class Timeouts(_Strict):
    """Time limits in seconds."""

    boot: Seconds = 60.0
    command: Seconds = 30.0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Profile(Features):
    """What the SMMU of the machine implements: the fields of `Features`, checked."""


class Machine(_Strict):
    """What QEMU builds and what the guest's kernel is told."""

    arch: Arch
    machine: Annotated[str, Field(pattern=r"^(virt|q35)(,.+)?$")]
    cpu: Annotated[str, Field(min_length=1)]
    cpus: Annotated[int, Field(ge=1, le=64)] = 1
    memory_mib: Annotated[int, Field(ge=256, le=65536)]
    accelerator: Annotated[str, Field(pattern=r"^(tcg|kvm)(,.+)?$")] = "tcg"
    console: Annotated[str, Field(pattern=r"^tty[A-Za-z]+[0-9]+$")]
    command_line: str = ""
    kernel_ats: bool = False
    """The guest's kernel may let functions use ATS: its device tree says that the PCI host passes it on."""
    msix: bool = True
    """On q35 the functions have MSI-X. Without it they can be unplugged after their server has died."""
    timeouts: Timeouts = Timeouts()
    smmu: Profile = Profile()
    devices: tuple[Device, ...] = ()

    @property
    def machine_type(self) -> str:
        """The machine without its options: `virt` or `q35`."""
        return self.machine.partition(",")[0]

    def device(self, name: str) -> Device:
        """Return the device of that name; raises `ConfigError` when there is none."""
        for device in self.devices:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in self.devices) or "none"
        raise ConfigError(f"no device {name!r} in this machine; its devices: {known}")

    @model_validator(mode="after")
    def _check_machine(self) -> Self:
        expected = {"aarch64": "virt", "x86_64": "q35"}[self.arch]
        if self.machine_type != expected:
            raise ValueError(f"machine: {self.arch} needs '{expected}'")
        return self

    @model_validator(mode="after")
    def _check_devices(self) -> Self:
        for index, device in enumerate(self.devices):
            where = f"devices[{index}]"
            if self.machine_type == "q35" and device.slot == _Q35_CHIPSET_SLOT:
                raise ValueError(f"{where}.slot: 31 holds q35's own functions, allowed: 1 to 30")
            for other in self.devices[:index]:
                if other.name == device.name:
                    raise ValueError(f"{where}.name: {device.name!r} is taken by another device")
                if other.slot == device.slot:
                    raise ValueError(f"{where}.slot: {device.slot} is taken by {other.name!r}")
                if device.model == other.model == "smmuv3":
                    raise ValueError(f"{where}.model: the SMMU is {other.name!r}, and there is one")
                self._check_interrupts(where, device, other)
        behind = sorted((each for each in self.devices if each.bus), key=lambda each: each.slot)
        for bus, device in enumerate(behind, start=1):
            if device.model == "smmuv3":
                raise ValueError(
                    f"devices: {device.name!r} is an SMMU, and belongs on the root bus"
                )
            if device.bus != bus:
                raise ValueError(
                    f"devices: the bus of {device.name!r} will be {bus}, not {device.bus}: "
                    "they are numbered in the order of the slots"
                )
        return self

    def _check_interrupts(self, where: str, device: Device, other: Device) -> None:
        # The guest's SMMU driver does not share its interrupt, and slots that are equal
        # modulo 4 get the same one. On q35 the SMMU has no driver of the guest's own.
        if self.machine_type != "virt" or "smmuv3" not in (device.model, other.model):
            return
        if device.slot % _VIRT_INTERRUPTS == other.slot % _VIRT_INTERRUPTS:
            raise ValueError(
                f"{where}.slot: {device.slot} has the same interrupt as slot {other.slot} "
                f"({other.name!r}), and an SMMU shares it with nobody; "
                f"allowed: a slot that differs from it modulo {_VIRT_INTERRUPTS}"
            )


def machine_directory() -> Path:
    """The folder of the machines that come with the project."""
    return Path(__file__).with_name("qemu-configs")


def scripts_directory() -> Path:
    """The scripts that run in the guest, where they are `/viommu/inside`."""
    return Path(__file__).with_name("inside")


def load_machine(machine: str | Path, smmu: str = "") -> Machine:
    """Read a machine: the name of one that comes with the project, or a TOML file's path.

    `smmu` are lines for its `[smmu]` table, and win over those that it has. Raises `ConfigError` with one sentence that
    says the file, the key and what is allowed.
    """
    path = Path(machine)
    if path.suffix != ".toml":
        path = machine_directory() / f"{machine}.toml"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in machine_directory().glob("*.toml")))
            raise ConfigError(f"no machine {str(machine)!r}; known: {known}, or a .toml file")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        if isinstance(table := document.setdefault("smmu", {}), dict):
            table |= _lines(smmu)
        return Machine.model_validate(document, context={"home": path.parent})
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {_sentence(error)}") from error


def _lines(smmu: str) -> dict[str, Any]:
    try:
        return tomllib.loads(smmu)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the lines for [smmu]: not TOML: {error}") from error


def _sentence(error: ValidationError) -> str:
    """Turn the first finding into `key: value, what is allowed`, and count the others."""
    details = error.errors(include_url=False)
    first = details[0]
    location = first["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    key = key.removeprefix(".")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    match first["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            allowed = ", ".join(sorted(_keys_beside(location)))
            return f"{key}: unknown key, allowed: {allowed}{more}"
        case "missing":
            return f"{key}: must be given{more}"
        case "value_error":
            where = f"{key}: " if key else ""
            return where + first["msg"].removeprefix("Value error, ") + more
        case _:
            return f"{key}: {first['input']!r} is wrong, {_allowed(first)}{more}"


def _allowed(detail: ErrorDetails) -> str:
    message = detail["msg"]
    return f"{message[0].lower()}{message[1:]}".replace("input should", "it should")


def _keys_beside(location: tuple[int | str, ...]) -> Iterable[str]:
    match location:
        case ("devices", *_):
            return Device.model_fields
        case ("timeouts", _):
            return Timeouts.model_fields
        case ("smmu", _):
            return (field.name for field in fields(Profile))
        case _:
            return Machine.model_fields
