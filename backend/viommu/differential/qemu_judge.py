"""QEMU's SMMUv3 as a judge: a case goes in, what QEMU's devices reached and what was recorded come out.

`iommu-testdev` writes and `intel-hda` reads: the first word that its command ring points to. Both do their DMA while
the register write that asks for it is under way, so the order of things is fixed. Where a DMA went is what QEMU's trace
of the SMMU says; for writes the data must be there.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from viommu.closing import Closing
from viommu.differential import board
from viommu.differential.cases import Access, Case, Outcome, Store, Verdict
from viommu.differential.qtest import Qtest

_SMMU: Final = 0x0905_0000
_ECAM: Final = 0x3F00_0000
_ROOT_PORT: Final = 3 << 3
_WINDOW: Final = {0: 0x1000_0000, 5: 0x1010_0000}
_PATTERN: Final = struct.pack("<I", 0x1234_5678)

# Registers of iommu-testdev.
_TRIGGER, _ADDRESS, _LENGTH, _DOORBELL = 0x00, 0x04, 0x0C, 0x14
# Registers of intel-hda: global control, the command ring, and how many responses it may owe.
_GCTL, _CORB_WP, _CORB_RP, _CORB_BASE, _CORB_CTL, _RINTCNT = 0x08, 0x48, 0x4A, 0x40, 0x4C, 0x5A

_TRACED: Final = ("success", "bypass", "abort")
_SUCCESS: Final = re.compile(
    r"smmuv3_translate_success \S+ sid=(0x\w+) iova=(0x\w+) translated=(0x\w+) perm=(0x\w+)"
)
_BYPASS: Final = re.compile(r"smmuv3_translate_bypass \S+ sid=(0x\w+) \D*iova:(0x\w+)")
_MACHINE: Final = "virt,iommu=smmuv3,gic-version=3,highmem=off"


def _devices() -> Iterator[str]:
    yield f"pcie-root-port,id=bridge,addr={_ROOT_PORT >> 3:#x},chassis=1,slot=1"
    for stream_id, writes in board.MASTERS:
        kind = "iommu-testdev" if writes else "intel-hda"
        bus = "bridge" if stream_id >> 8 else "pcie.0"
        address = f"{stream_id >> 3 & 31:#x}.{stream_id & 7}"
        yield f"{kind},bus={bus},addr={address}" + (",multifunction=on" if writes else "")


class QemuJudge(Closing):
    """One QEMU process for many cases; it is started anew where QEMU forgets nothing."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = [
            *argv,
            *("-no-user-config", "-nodefaults", "-nic", "none", "-display", "none"),
            *("-machine", _MACHINE, "-cpu", "cortex-a57"),
            *(word for name in _TRACED for word in ("-trace", f"smmuv3_translate_{name}")),
            *(word for device in _devices() for word in ("-device", device)),
        ]
        self.starts = 0
        self._bars: dict[int, int] = {}
        self._qtest = self._start()
        self.idrs = self._qtest.batch(f"readl {_SMMU + offset:#x}" for offset in board.IDR)

    def close(self) -> None:
        """End QEMU."""
        self._qtest.close()

    def _start(self) -> Qtest:
        qtest = Qtest(self._argv, board.RAM_SIZE)
        try:
            qtest.batch(self._power_on())
        except BaseException:
            qtest.close()
            raise
        words = range(board.RAM, board.RAM + board.RAM_SIZE, 8)
        qtest.ram[:] = struct.pack(f"<{len(words)}Q", *words)
        self.starts += 1
        self._was_two_level = False
        return qtest

    def _power_on(self) -> Iterator[str]:
        """What firmware does: bus numbers, windows, BARs, memory space and bus master enable."""
        port = _ECAM + (_ROOT_PORT << 12)
        yield f"writel {port + 0x18:#x} {0x05_05_00:#x}"
        yield f"writel {port + 0x20:#x} {_WINDOW[5] >> 16 | _WINDOW[5]:#x}"
        yield f"writew {port + 0x04:#x} 0x6"
        for place, (stream_id, writes) in enumerate(board.MASTERS):
            config = _ECAM + (stream_id << 12)
            bar = self._bars[stream_id] = _WINDOW[stream_id >> 8] + place * 0x4000
            yield f"writel {config + 0x10:#x} {bar:#x}"
            yield f"writew {config + 0x04:#x} 0x6"
            if writes:
                yield f"writel {bar + _LENGTH:#x} {board.SIZE:#x}"
            else:
                yield f"writel {bar + _GCTL:#x} 0x1"
                yield f"writew {bar + _RINTCNT:#x} 0xff"
                yield f"writeb {bar + _CORB_CTL:#x} 0x2"

    def _access(self, access: Access) -> Iterator[str]:
        bar, low, high = self._bars[access.stream_id], access.iova & 0xFFFF_FFFF, access.iova >> 32
        if access.write:
            yield f"writel {bar + _ADDRESS:#x} {low:#x}"
            yield f"writel {bar + _ADDRESS + 4:#x} {high:#x}"
            yield f"writel {bar + _DOORBELL:#x} 0x1"
            yield f"readl {bar + _TRIGGER:#x}"
        else:
            # The ring begins at a multiple of 128; the entry behind the read pointer is read.
            entry = low >> 2 & 31
            yield f"writel {bar + _CORB_BASE:#x} {low & ~0x7F:#x}"
            yield f"writel {bar + _CORB_BASE + 4:#x} {high:#x}"
            yield f"writew {bar + _CORB_RP:#x} {(entry - 1) & 0xFF:#x}"
            yield f"writew {bar + _CORB_WP:#x} {entry:#x}"

    def _program(self, case: Case) -> Iterator[str]:
        def write(offset: int, value: int, size: str = "l") -> str:
            return f"write{size} {_SMMU + offset:#x} {value:#x}"

        yield write(board.CR0, 0)
        yield write(board.CR2, case.cr2)
        yield write(board.STRTAB_BASE, case.strtab_base, "q")
        yield write(board.STRTAB_BASE_CFG, case.strtab_base_cfg)
        yield write(board.CMDQ_BASE, board.COMMANDS | board.COMMANDS_LOG2, "q")
        yield write(board.EVENTQ_BASE, board.EVENTS | board.EVENTS_LOG2, "q")
        for offset in (board.CMDQ_PROD, board.CMDQ_CONS, board.EVENTQ_PROD, board.EVENTQ_CONS):
            yield write(offset, 0)
        yield write(board.CR0, board.ENABLED)

    def _lines(self, case: Case) -> Iterator[str]:
        yield from self._program(case)
        produced = 3
        yield f"writel {_SMMU + board.CMDQ_PROD:#x} {produced:#x}"
        for step in case.steps:
            if isinstance(step, Access):
                yield from self._access(step)
                yield f"readl {_SMMU + board.EVENTQ_PROD:#x}"
            elif isinstance(step, Store):
                yield f"writeq {step.address:#x} {step.value:#x}"
            else:
                produced += len(step.words) + 1
                yield f"writel {_SMMU + board.CMDQ_PROD:#x} {produced:#x}"
        for offset in (board.CMDQ_CONS, board.GERROR, board.GERRORN):
            yield f"readl {_SMMU + offset:#x}"

    def judge(self, case: Case) -> Verdict:
        """Run `case`. Raises `QtestError` when QEMU does not survive it; the next case has a new one."""
        # QEMU never goes back from a 2-level to a linear table, short of a reset.
        if self._was_two_level and not case.two_level:
            self._restart()
        self._was_two_level |= case.two_level
        self._load(case)
        lines = list(self._lines(case))
        try:
            values = self._qtest.batch(lines)
        except BaseException:
            self._restart()
            raise
        event_prods = [
            value
            for line, value in zip(lines, values, strict=True)
            if line == f"readl {_SMMU + board.EVENTQ_PROD:#x}"
        ]
        consumed, gerror, acknowledged = values[-3:]
        verdict = Verdict(self._outcomes(case, event_prods), consumed, gerror ^ acknowledged)
        if verdict.gerror:
            self._qtest.batch(
                [
                    f"writel {_SMMU + board.CR0:#x} 0",
                    f"writel {_SMMU + board.GERRORN:#x} {gerror:#x}",
                ]
            )
        self._unload(case, verdict)
        return verdict

    def _restart(self) -> None:
        self._qtest.close()
        self._qtest = self._start()

    def _outcomes(self, case: Case, event_prods: list[int]) -> tuple[Outcome, ...]:
        log = iter(self._qtest.log())
        line = next(log, None)
        outcomes = []
        before = 0
        for access, after in zip(case.accesses, event_prods, strict=True):
            events = tuple(self._event(index) for index in range(before, after))
            before = after
            reached = None
            if line is not None and _is_about(line, access):
                reached = self._reached(line, access)
                line = next(log, None)
            outcomes.append(Outcome(reached, events))
        assert line is None, f"QEMU did something that nobody asked for: {line}"
        return tuple(outcomes)

    def _event(self, index: int) -> int:
        place = board.EVENTS - board.RAM + index * board.EVENT_SIZE
        return int.from_bytes(self._qtest.ram[place : place + board.EVENT_SIZE], "little")

    def _reached(self, line: str, access: Access) -> int | None:
        if line.startswith("smmuv3_translate_abort"):
            return None
        address = access.iova
        if match := _SUCCESS.match(line):
            address = int(match[3], 16)
            # The memory system refuses what the entry does not permit, whatever the SMMU thought.
            if not int(match[4], 16) & (2 if access.write else 1):
                return None
        if access.write and board.in_ram(address, board.SIZE):
            place = address - board.RAM
            landed = self._qtest.ram[place : place + board.SIZE]
            assert landed == _PATTERN, f"nothing was written to {address:#x}: {line}"
        return address

    # Memory

    def _put(self, address: int, word: int) -> None:
        struct.pack_into("<Q", self._qtest.ram, address - board.RAM, word)

    def _load(self, case: Case) -> None:
        for address, word in case.image.items():
            self._put(address, word)
        commands = [word for command in case.commands() for word in command]
        struct.pack_into(
            f"<{len(commands)}Q", self._qtest.ram, board.COMMANDS - board.RAM, *commands
        )

    def _unload(self, case: Case, verdict: Verdict) -> None:
        """Every word holds its own address again."""
        for address in case.touched:
            self._put(address, address)
        for outcome in verdict.outcomes:
            if outcome.reached is not None and board.in_ram(outcome.reached, board.SIZE):
                self._put(outcome.reached & ~7, outcome.reached & ~7)


def _is_about(line: str, access: Access) -> bool:
    """An aborted access and one that went through each leave a line; one that faulted leaves none."""
    numbers = [int(number, 16) for number in re.findall(r"(?:sid=|iova[=:])(0x\w+)", line)]
    return numbers == [access.stream_id, access.iova]
