"""Where a port's transactions pass the host SMMU: behind the guest's own, in front of guest RAM.

A port has a path only while a host domain concerns its stream. A transaction is then in flight in both SMMUs, and one
that was in flight before is taken over, as the host SMMU would have had it in bypass.
"""

from collections.abc import Iterable

from viommu.smmu import Access, Smmu, Translation


class HostPath:
    """The way of stream `stream_id` through the host SMMU, with `in_flight` under way already."""

    def __init__(self, smmu: Smmu, stream_id: int, in_flight: Iterable[Translation]) -> None:
        self._smmu = smmu
        self._read, self._write = Access(stream_id), Access(stream_id, write=True)
        # By the port's transaction: what is in flight of it in the host SMMU.
        self._held: dict[int, Translation] = {}
        for translation in in_flight:
            self._held[id(translation)] = translation
            smmu.in_flight.add(translation)

    def enter(self, translation: Translation) -> None:
        """Send the ranges of `translation`, guest physical addresses, on to where the host SMMU has them go.

        It becomes shorter where the host SMMU lets only its front pass. To the host it is plain data of the stream.
        Raises `TransactionAborted` when not even the first byte passes.
        """
        access = self._write if translation.access.write else self._read
        passed = self._smmu.translate_ranges(access, translation.runs)
        translation.runs, translation.size = passed.runs, passed.size
        self._held[id(translation)] = passed

    def leave(self, translation: Translation) -> None:
        """The port's transaction is over; one that never entered is nobody's business."""
        passed = self._held.pop(id(translation), None)
        if passed is not None:
            self._smmu.retire(passed)

    def close(self) -> None:
        """No host domain concerns the stream any more: what is in flight goes on without the host SMMU."""
        while self._held:
            self._smmu.retire(self._held.popitem()[1])
