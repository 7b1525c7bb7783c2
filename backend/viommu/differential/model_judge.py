"""Our SMMU as the judge: the same case over a plain byte array."""

import struct
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

from viommu.differential import board
from viommu.differential.cases import Access, Case, Outcome, Store, Verdict
from viommu.memory import BusError, GuestMemory
from viommu.smmu import Access as SmmuAccess
from viommu.smmu import Smmu, TransactionAborted

MakeSmmu: TypeAlias = Callable[[GuestMemory], Smmu]
_PATTERN = struct.pack("<I", 0x1234_5678)


class ModelJudge:
    """One model for many cases, reset before each. `make` makes it over the memory that it is given.

    `privileged` says how every access goes; PCI devices without a PASID are unprivileged.
    """

    def __init__(self, make: MakeSmmu, *, privileged: bool = False) -> None:
        words = range(board.RAM, board.RAM + board.RAM_SIZE, 8)
        self._ram = bytearray(struct.pack(f"<{len(words)}Q", *words))
        memory = GuestMemory()
        memory.add_region(board.RAM, board.RAM_SIZE, memoryview(self._ram))
        self._memory = memory
        self._smmu = make(memory)
        self.privileged = privileged
        self.idrs = [self._smmu.read(offset, 4) for offset in board.IDR]

    def judge(self, case: Case) -> Verdict:
        """Run `case`."""
        for address, word in case.image.items():
            self._put(address, word)
        commands = [word for command in case.commands() for word in command]
        struct.pack_into(f"<{len(commands)}Q", self._ram, board.COMMANDS - board.RAM, *commands)
        smmu = self._smmu
        smmu.reset()
        self._program(case)
        outcomes = []
        produced = 3
        self._produce(produced)
        for step in case.steps:
            if isinstance(step, Access):
                outcomes.append(self._access(step))
            elif isinstance(step, Store):
                self._put(step.address, step.value)
            else:
                produced += len(step.words) + 1
                self._produce(produced)
        verdict = Verdict(
            tuple(outcomes), smmu.read(board.CMDQ_CONS, 4), smmu.read(board.GERROR, 4)
        )
        self._unload(case, verdict)
        return verdict

    def _program(self, case: Case) -> None:
        write = self._smmu.write
        write(board.CR2, 4, case.cr2)
        write(board.STRTAB_BASE, 8, case.strtab_base)
        write(board.STRTAB_BASE_CFG, 4, case.strtab_base_cfg)
        write(board.CMDQ_BASE, 8, board.COMMANDS | board.COMMANDS_LOG2)
        write(board.EVENTQ_BASE, 8, board.EVENTS | board.EVENTS_LOG2)
        write(board.CR0, 4, board.ENABLED)

    def _produce(self, position: int) -> None:
        self._smmu.write(board.CMDQ_PROD, 4, position)
        while self._smmu.step():
            pass

    def _access(self, access: Access) -> Outcome:
        before = self._smmu.read(board.EVENTQ_PROD, 4)
        transaction = SmmuAccess(access.stream_id, write=access.write, privileged=self.privileged)
        reached = None
        try:
            translation = self._smmu.translate(transaction, access.iova, board.SIZE)
        except TransactionAborted:
            pass
        else:
            reached = translation.runs[0]
            if access.write:
                with suppress(BusError):  # it may reach a place without memory
                    self._memory.write(reached, _PATTERN)
            self._smmu.retire(translation)
        after = self._smmu.read(board.EVENTQ_PROD, 4)
        return Outcome(reached, tuple(self._event(index) for index in range(before, after)))

    def _event(self, index: int) -> int:
        place = board.EVENTS - board.RAM + index * board.EVENT_SIZE
        return int.from_bytes(self._ram[place : place + board.EVENT_SIZE], "little")

    def _put(self, address: int, word: int) -> None:
        struct.pack_into("<Q", self._ram, address - board.RAM, word)

    def _unload(self, case: Case, verdict: Verdict) -> None:
        for address in case.touched:
            self._put(address, address)
        for outcome in verdict.outcomes:
            if outcome.reached is not None and board.in_ram(outcome.reached, board.SIZE):
                self._put(outcome.reached & ~7, outcome.reached & ~7)
