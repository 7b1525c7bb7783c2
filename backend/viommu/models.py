"""Who makes the model of a function: one of ours by its name, or a class of the user's own."""

import importlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, Protocol

from vfio_user import DeviceError, VfioUserError
from viommu.disks import ImageFormat, open_disk
from viommu.endpoints.base import Bar, Endpoint, Identity
from viommu.endpoints.nvme.controller import NvmeController
from viommu.endpoints.port import DmaPort
from viommu.endpoints.test_engine import SmmuTestEngine
from viommu.trace import Tracer

_log = logging.getLogger(__name__)
_DERIVE = "derive it from viommu.endpoints.master.DmaMaster"


class ModelError(Exception):
    """A class of the user's own cannot be a model: says which, why, and where that is."""


class FunctionSpec(Protocol):
    """What must be known of a function: `viommu.lab.config.Device` says it."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> str:
        """`smmuv3`, `test-engine`, `nvme`, or where a class is: `/path/file.py:Class`, `package.module:Class`."""
        ...

    @property
    def stream_id(self) -> int: ...
    @property
    def disk(self) -> Path | None: ...
    @property
    def disk_format(self) -> ImageFormat | None: ...
    @property
    def snapshot(self) -> bool: ...
    @property
    def size(self) -> int | None: ...
    @property
    def write_cache(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]:
        """Further arguments of such a class."""
        ...


def make_endpoint(
    spec: FunctionSpec,
    port: DmaPort,
    *,
    order: Random,
    tracer: Tracer,
    held: ExitStack,
    wake: Callable[[], None],
) -> Endpoint:
    """The model of a function that reaches memory through `port`. What it needs open is closed with `held`.

    `order` shuffles what it does at the same time; `wake` is called, from any thread, when it is busy again by itself.
    Raises `ModelError`; `OSError` or `DiskError` for a disk.
    """
    if spec.model == "test-engine":
        return SmmuTestEngine(port, name=spec.name, order=order, tracer=tracer)
    if spec.model == "nvme":
        store = held.enter_context(
            open_disk(
                spec.disk,
                spec.size,
                spec.disk_format,
                snapshot=spec.snapshot,
                volatile=spec.write_cache == "volatile",
                wake=wake,
            )
        )
        return NvmeController(port, store, clock=time.monotonic, name=spec.name, tracer=tracer)
    with blamed(spec):
        model: Endpoint = _class_of(spec)(port, name=spec.name, tracer=tracer, **spec.options)
        model.reset()
        if not isinstance(model.identity, Identity):
            raise _Mistake("its identity must be an Identity")
        if not all(isinstance(bar, Bar) for bar in model.bars):
            raise _Mistake("its bars must be a tuple of Bar: (Bar(0, 0x1000),)")
    return model


class _Mistake(Exception):
    """What is wrong with a class of the user's own."""


@contextmanager
def blamed(spec: FunctionSpec) -> Iterator[None]:
    """Turn what a class of the user's own raises, and what it declares wrongly, into a `ModelError`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        ours = ":" not in spec.model or (
            isinstance(error, VfioUserError) and not isinstance(error, DeviceError)
        )
        if ours:
            raise
        _log.info("%s: what its model raised", spec.name, exc_info=True)
        raise ModelError(f"device {spec.name!r}: {spec.model}: {_sentence(error)}") from error


def _sentence(error: BaseException) -> str:
    if isinstance(error, _Mistake | DeviceError):
        return str(error)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    ours = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [each for each in frames if not each.filename.startswith((ours, "<"))]
    if not theirs or isinstance(error, SyntaxError):  # which says where by itself
        return text
    return f"{text} ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})"


def _class_of(spec: FunctionSpec) -> type[Any]:
    """Raises `_Mistake`, and whatever the module raises."""
    place, _, name = spec.model.rpartition(":")
    module = _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    found = getattr(module, name, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if _is_theirs(module, value)]
        raise _Mistake(f"there is no {name!r}, but {', '.join(classes) or 'no endpoint at all'}")
    if not isinstance(found, type) or not issubclass(found, Endpoint):
        raise _Mistake(f"it is no Endpoint: {_DERIVE}")
    if missing := sorted(found.__abstractmethods__):
        raise _Mistake(f"every endpoint needs {', '.join(missing)}, and it has none")
    return found


def _is_theirs(module: ModuleType, value: object) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, Endpoint)
        and value.__module__ == module.__name__
    )


def _file(path: Path) -> ModuleType:
    """The module in a file, once however many models it has. What lies beside it can be imported, as by a script."""
    path = path.resolve()
    name = str(path)
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise _Mistake("there is no such file; its path begins at the folder of the TOML file")
    found = spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = sys.modules[name] = module_from_spec(found)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
