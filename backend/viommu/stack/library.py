"""The filters that can be attached by name."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from viommu.smmu import Translation
from viommu.stack.filters import Filter, Outcome, Request
from viommu.trace import Event, Tracer


@dataclass(frozen=True, slots=True)
class TransactionTraced(Event):
    """A transaction has passed the tracing filter `device`: what went down, where it went, how it ended.

    `runs` are the physical addresses and lengths, flat; none if it was not translated.
    """

    device: str
    stream_id: int
    substream_id: int | None
    iova: int
    size: int
    write: bool
    runs: tuple[int, ...]
    outcome: str
    why: str | None


class TracingFilter(Filter):
    """Emits an event for each transaction when it is over."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[int, ...]] = {}

    def started(self, name: str, tracer: Tracer) -> None:
        self._name, self._tracer = name, tracer

    def after_translation(self, request: Request, translation: Translation) -> None:
        self._runs[id(request)] = tuple(translation.runs)

    def completed(self, request: Request, outcome: Outcome) -> None:
        runs = self._runs.pop(id(request), ())
        if self._tracer:
            access = request.access
            self._tracer.emit(
                TransactionTraced(
                    self._name,
                    access.stream_id,
                    access.substream_id,
                    request.iova,
                    sum(runs[1::2]) or request.size,
                    access.write,
                    runs,
                    outcome.name,
                    request.why,
                )
            )


@dataclass
class CorruptingFilter(Filter):
    """Flips the bits of `mask` in the first byte of every `every`th transaction that moves."""

    every: Annotated[int, Field(ge=1)] = 1
    mask: Annotated[int, Field(ge=1, le=0xFF)] = 0xFF

    def __post_init__(self) -> None:
        self._seen = 0

    def data(self, request: Request, data: memoryview) -> None:  # noqa: ARG002 - any will do
        self._seen += 1
        if self._seen % self.every == 0:
            data[0] ^= self.mask


FILTERS: dict[str, type[Filter]] = {"tracing": TracingFilter, "corrupting": CorruptingFilter}
"""By the name of the driver that creates them."""
