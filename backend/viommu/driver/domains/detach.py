"""The steps of a detach (IHI 0070, 3.21, 4.3 to 4.6).

The order is the architecture's. First the STE aborts, so that what comes is refused; then what came before is waited
for; only then may the caches be emptied, or they would be filled anew. The TLB goes before the ATCs, which are filled
from it. Stalled transactions come last: they were never translated, so that no CMD_SYNC waits for them, and while the
STE aborts no further one can stall.
"""

from collections.abc import Callable, Iterator

from viommu.driver.domains.attachments import Attachment, AttachmentState
from viommu.driver.domains.events import DetachStepped, Step
from viommu.driver.domains.status import NtStatus, status_of
from viommu.driver.errors import CommandQueueError, DriverError
from viommu.driver.queues import PendingSync
from viommu.driver.smmu import SmmuDriver
from viommu.layouts.commands import Command, Opcode, StreamCommand

_LEAF = 1


class Detach:
    """One detach. It ends at the first step that fails, with the streams blocked, and can be run again from the top.

    Each wait is bounded by the time-out of the driver's `Poll`, and the first that runs into it is the last one.
    """

    def __init__(
        self,
        driver: SmmuDriver,
        attachment: Attachment,
        *,
        flush_faults: Callable[[], None],
        observe: Callable[[DetachStepped], None],
        clock: Callable[[], float],
    ) -> None:
        self._driver, self._attachment = driver, attachment
        self._flush_faults, self._observe, self._clock = flush_faults, observe, clock
        self._sync: PendingSync

    def run(self) -> NtStatus:
        """Detach. On success the streams use nothing any more, and what they used is given back."""
        attachment = self._attachment
        self._forget_old_errors()
        for step, action in self._steps():
            started = self._clock()
            try:
                action()
                status = NtStatus.SUCCESS
            except DriverError as error:
                status = status_of(error)
            now = self._clock()
            self._observe(
                DetachStepped(
                    now, attachment.device.name, attachment.base, step, now - started, status
                )
            )
            if not status.success:
                return status
        for stream_id in attachment.streams:
            self._driver.release(stream_id)
        attachment.state = AttachmentState.DETACHED
        return NtStatus.SUCCESS

    def _steps(self) -> Iterator[tuple[Step, Callable[[], None]]]:
        device, space = self._attachment.device, self._attachment.domain.space
        streams = list(self._attachment.streams)
        yield Step.BLOCK, self._block
        yield Step.INVALIDATE_CONFIGURATION, self._invalidate_configuration
        yield Step.DRAIN, lambda: self._driver.commands.finish(self._sync)
        if space is not None:
            yield Step.INVALIDATE_TLB, space.invalidate_tlb
            if device.ats:
                yield Step.INVALIDATE_ATC, lambda: space.invalidate_atcs(streams)
            if device.stalls or self._driver.features.must_stall:
                yield Step.END_STALLS, lambda: self._driver.terminate_stalls(*streams)
        yield Step.FLUSH_FAULTS, self._flush_faults

    def _block(self) -> None:
        for stream_id in self._attachment.streams:
            self._driver.block(stream_id)
        self._attachment.state = AttachmentState.BLOCKED

    def _invalidate_configuration(self) -> None:
        commands: list[Command] = []
        for stream_id in self._attachment.streams:
            for opcode in (Opcode.CMD_CFGI_STE, Opcode.CMD_CFGI_CD_ALL):
                command = StreamCommand(opcode=opcode, stream_id=stream_id)
                command.leaf_or_range = _LEAF if opcode == Opcode.CMD_CFGI_STE else 0
                commands.append(command)
        self._driver.commands.issue(*commands)
        self._sync = self._driver.commands.begin_sync()

    def _forget_old_errors(self) -> None:
        # Of a CMD_SYNC that nobody waits for any more: it is not this detach that failed.
        try:
            self._driver.commands.raise_error()
        except CommandQueueError:
            return
