"""The driver on the model: bringing the SMMU up and down, and what it cannot be brought to."""

import pytest

from tests.driver_rig import DATA, PAGE, RAM, STREAM, TABLES, Frame, Rig, record
from viommu.driver.access import Poll
from viommu.driver.arena import Arena
from viommu.driver.errors import DriverTimeout, StreamError, UnsupportedSmmu
from viommu.driver.queues import Completion
from viommu.driver.smmu import DetachMode, SmmuDriver
from viommu.layouts.records import EventType
from viommu.layouts.registers import Register
from viommu.smmu import Features, TransactionAborted


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_nothing_leaks(rig: Rig) -> None:
    whole = rig.arena.free_bytes
    driver = rig.driver
    for table in TABLES.values():
        driver.reset(table(driver))
        free = rig.arena.free_bytes
        for how in (DetachMode.STE_ABORT, DetachMode.STE_INVALID):
            for substream_bits in (0, 8):
                domain = driver.create_domain()
                domain.map(0x1_0000, DATA, 3 * PAGE)
                driver.attach(0, domain, substream_bits=substream_bits)
                driver.detach(0, how)
                domain.close()
        # What is left is the second level of the stream table.
        assert free - rig.arena.free_bytes <= 64 << 10
        assert len(rig.smmu.tlb) == 0
    driver.close()
    assert rig.arena.free_bytes == whole
    with pytest.raises(TransactionAborted):
        rig.dma(DATA)


def test_reset_takes_over_a_running_smmu(rig: Rig) -> None:
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    domain.map(0x1_0000, DATA, PAGE)
    driver.attach(STREAM, domain)
    rig.dma(0x1_0000)
    second = SmmuDriver(Frame(rig.smmu), Arena([(DATA, rig.ram[DATA - RAM :])]))
    second.reset()
    with pytest.raises(TransactionAborted):
        rig.dma(0x1_0000)
    assert second.events() == [record(EventType.C_BAD_STREAMID)]
    assert len(rig.smmu.tlb) == 0


def test_what_the_smmu_lacks_is_said() -> None:
    rig = Rig(Features(substream_id_bits=4, stream_id_bits=8))
    driver = rig.driver
    driver.reset()
    domain = driver.create_domain()
    with pytest.raises(UnsupportedSmmu, match="4 SubstreamID bits"):
        driver.attach(STREAM, domain, substream_bits=5)
    with pytest.raises(StreamError, match=r"2\^8"):
        driver.attach(0x100, domain)
    with pytest.raises(UnsupportedSmmu, match="16 bits"):
        driver.create_domain(asid=1 << 16)
    with pytest.raises(StreamError, match="no domain"):
        driver.detach(STREAM, DetachMode.CD_INVALID)


@pytest.mark.parametrize(
    ("register", "value", "why"),
    [
        (Register.IDR0, 0, "no stage 1"),
        (Register.IDR0, 1 << 1, "AArch64"),
        (Register.IDR0, 1 << 1 | 2 << 2 | 3 << 21, "little-endian"),
        (Register.IDR0, 1 << 1 | 2 << 2 | 2 << 21, "caches"),
        (Register.IDR1, 1 << 30, "preset"),
        (Register.IDR5, 0, "4 KiB"),
    ],
)
def test_an_smmu_that_cannot_be_driven_is_refused(register: Register, value: int, why: str) -> None:
    rig = Rig()

    class Odd(Frame):
        def read32(self, offset: int) -> int:
            return value if offset == register else super().read32(offset)

    with pytest.raises(UnsupportedSmmu, match=why):
        SmmuDriver(Odd(rig.smmu), rig.arena)


def test_a_missing_smmu_is_refused() -> None:
    class Nobody(Frame):
        def read32(self, offset: int) -> int:
            return 0xFFFF_FFFF

    rig = Rig()
    with pytest.raises(UnsupportedSmmu, match="nobody is there"):
        SmmuDriver(Nobody(rig.smmu), rig.arena)


def test_a_register_that_never_acknowledges_times_out(rig: Rig) -> None:
    class Deaf(Frame):
        def read32(self, offset: int) -> int:
            return 0 if offset == Register.CR0ACK else super().read32(offset)

    driver = SmmuDriver(Deaf(rig.smmu), rig.arena, Poll(timeout=0.05))
    with pytest.raises(DriverTimeout, match="CR0ACK"):
        driver.reset()


def test_the_registers_are_written_in_the_order_of_the_architecture(rig: Rig) -> None:
    """6.3.9: tables and queues before their enables, the queues before SMMUEN, each enable acknowledged."""
    written: list[tuple[str, int]] = []

    class Recorder(Frame):
        def write32(self, offset: int, value: int) -> None:
            written.append((Register(offset).name, value))
            super().write32(offset, value)

        def write64(self, offset: int, value: int) -> None:
            written.append((Register(offset).name, 0))
            super().write64(offset, value)

    SmmuDriver(Recorder(rig.smmu), rig.arena).reset(interrupts=True)
    order = [f"{name}={value:#x}" if name == "CR0" else name for name, value in written]
    expected = [
        *("GBPA", "CR0=0x0", "CR1", "CR2", "STRTAB_BASE", "STRTAB_BASE_CFG"),
        *("CMDQ_BASE", "CMDQ_PROD", "CMDQ_CONS", "GERRORN", "CR0=0x8"),
        *("CMDQ_PROD", "CMDQ_PROD"),  # CFGI_ALL, CMD_SYNC
        *("CMDQ_PROD", "CMDQ_PROD"),  # TLBI_NSNH_ALL, CMD_SYNC
        *("EVENTQ_BASE", "EVENTQ_PROD", "EVENTQ_CONS", "CR0=0x1c"),
        *("IRQ_CTRL", "GERROR_IRQ_CFG0", "EVENTQ_IRQ_CFG0", "IRQ_CTRL", "CR0=0x1d"),
    ]
    assert order == expected


def test_an_smmu_without_messages_is_polled() -> None:
    rig = Rig(Features(msi=False))
    with pytest.raises(UnsupportedSmmu, match="does not send messages"):
        rig.driver.reset(completion=Completion.MSI)
    rig.driver.reset()
    assert rig.driver.commands.completion is Completion.CONS
    rig.driver.attach_bypass(STREAM)
    assert rig.dma(DATA) == [(DATA, 8)]
