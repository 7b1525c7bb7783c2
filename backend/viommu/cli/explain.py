"""A user's mistake as one sentence, and a signal as an orderly end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console

from vfio_user import LibraryError, SocketBusy, VfioUserError
from viommu.cli.demo import ActFailed
from viommu.control import ControlError
from viommu.faults.plan import PlanError
from viommu.lab.errors import GuestError, LabError, QemuTooOld
from viommu.models import ModelError
from viommu.scenarios import ScenarioError

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def explained(console: Console) -> Iterator[None]:
    """Turn a user's mistake into one sentence on `console` and exit code 1, without a traceback.

    What a guest that failed leaves behind follows the sentence. SIGTERM and SIGHUP end the program as an exception
    does, so that nothing is left lying about.
    """
    with _orderly_end():
        try:
            yield
        except (
            LabError,
            VfioUserError,
            ActFailed,
            ControlError,
            PlanError,
            ScenarioError,
            ModelError,
            OSError,
        ) as error:
            complain(console, _sentence(error))
            if isinstance(error, GuestError):
                console.print(str(error.evidence), style="dim", highlight=False, markup=False)
            raise typer.Exit(1) from None


def complain(console: Console, sentence: str) -> None:
    """Say what is wrong, on one line however long: it may be read by another program."""
    console.print(f"viommu: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)


def _sentence(error: Exception) -> str:
    match error:
        case QemuTooOld():
            return f"{error.message}; viommu setup provides one"
        case LabError():
            return error.message
        case SocketBusy():
            return f"{error}: end that one, or choose another --directory"
        case LibraryError(function=function) if function.startswith("vfu_create_ctx on "):
            path = function.removeprefix("vfu_create_ctx on ")
            reason = str(error).rpartition(": ")[2]
            return f"the socket {path} cannot be made: {reason}; choose another --directory"
        case OSError(filename=str(path), strerror=str(reason)):
            return f"{path}: {reason}"
        case _:
            return str(error)


@contextmanager
def _orderly_end() -> Iterator[None]:
    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)  # what a shell says of a command that a signal ended

    before = {number: signal.signal(number, end) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
