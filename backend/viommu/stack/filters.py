"""What a filter is: a device object above an endpoint's, which sees each DMA at four points and may change it."""

from dataclasses import dataclass, field
from enum import Enum

from viommu.endpoints.port import DmaAttributes
from viommu.smmu import Access, Translation
from viommu.stack.objects import DeviceObject
from viommu.trace import Tracer


class Abort(Exception):
    """Raised by a filter at any point but the last: the device sees an abort, for the reason given."""


class Diverted(Exception):
    """Raised by a filter that sees the bytes of a write: it has taken care of them, and they move no further."""


class Outcome(Enum):
    """How a transaction ended."""

    MOVED = "its bytes moved"
    ABORTED = "the device saw an abort"
    STALLED = "it waits for software; the device begins another one"
    ENDED = "it ended without moving its bytes"


@dataclass(slots=True)
class Request:
    """A transaction as it goes down the stack. A filter may change any part of it before translation.

    `size` may become less, not more: the device has no more room. What is above the filter does not see the changes:
    the device's own address goes into the abort that it sees.
    """

    access: Access
    iova: int
    size: int
    attributes: DmaAttributes
    why: str | None = field(default=None, init=False)
    """Why it was aborted."""


class Filter:
    """A filter that does nothing: redefine the points that matter.

    The first three may raise `Abort`. They see a transaction from the top of the stack to its bottom, but for the data
    of a read and the completion, which go up. `completed` is called once for each transaction that `before_translation`
    was called for.
    """

    def started(self, name: str, tracer: Tracer) -> None:
        """The filter's device object is called `name`, and is about to be attached."""

    def before_translation(self, request: Request) -> None:
        """A transaction begins: `request` is what the SMMU will be asked for."""

    def after_translation(self, request: Request, translation: Translation) -> None:
        """It was translated. The addresses in `translation.runs` may be changed, not the bytes they cover."""

    def data(self, request: Request, data: memoryview) -> None:
        """The bytes of a write before they reach memory, or those of a read after they left it; may be changed."""

    def moved(self, request: Request) -> None:
        """Its bytes have moved, as far as the device knows."""

    def holds(self, request: Request) -> bool:  # noqa: ARG002
        """Whether it has to wait, in flight: after its translation, or after its bytes moved."""
        return False

    def completed(self, request: Request, outcome: Outcome) -> None:
        """It is over."""


class FilterDevice(DeviceObject):
    """The device object of a filter."""

    def __init__(self, name: str, what: Filter) -> None:
        super().__init__(name)
        self.filter = what
