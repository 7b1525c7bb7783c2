"""What both sides have in common: the memory map, who does DMA, and the SMMU's registers as raw offsets."""

from typing import Final, NamedTuple

RAM: Final = 0x4000_0000
RAM_SIZE: Final = 32 << 20
"""Guest RAM of QEMU's virt machine, bytes. Every word of it holds its own address unless a case says otherwise."""

COMMANDS: Final = 0x4080_0000
EVENTS: Final = 0x4081_0000
COMMANDS_LOG2: Final = 8
EVENTS_LOG2: Final = 6

TABLES: Final = 0x4100_0000
TABLES_SIZE: Final = 2 << 20
"""Where a case's stream tables, context descriptors and page tables lie."""
TARGETS: Final = 0x4120_0000
TARGETS_SIZE: Final = 2 << 20
"""Where a case's DMA goes."""

NOWHERE: Final = 0x20_0000_0000
"""128 GiB: an address within every output size of 40 bits or more, and not in memory."""


class Master(NamedTuple):
    """A device that does DMA in one direction."""

    stream_id: int
    writes: bool


MASTERS: Final = tuple(
    Master(stream_id | reads, not reads) for stream_id in (0x08, 0xF8, 0x500) for reads in (0, 1)
)
"""A writer and a reader in two slots of bus 0 and in one of bus 5: each pair is a writer and the reader beside it."""

SIZE: Final = 4
"""Bytes of one access. What is longer, QEMU may split where it is refused."""

CR0, CR0ACK, CR2 = 0x20, 0x24, 0x2C
GERROR, GERRORN = 0x60, 0x64
STRTAB_BASE, STRTAB_BASE_CFG = 0x80, 0x88
CMDQ_BASE, CMDQ_PROD, CMDQ_CONS = 0x90, 0x98, 0x9C
EVENTQ_BASE, EVENTQ_PROD, EVENTQ_CONS = 0xA0, 0x1_00A8, 0x1_00AC
IDR: Final = (0x00, 0x04, 0x0C, 0x14)
"""SMMU_IDR0, IDR1, IDR3 and IDR5 (IHI 0070, 6.3)."""

ENABLED: Final = 1 << 0 | 1 << 2 | 1 << 3
"""SMMU_CR0: SMMUEN, EVENTQEN and CMDQEN (6.3.9)."""
EVENT_SIZE: Final = 32
COMMAND_SIZE: Final = 16

CFGI_ALL: Final = (0x04, 31)
TLBI_NSNH_ALL: Final = (0x30, 0)
SYNC: Final = (0x46, 0)
"""The commands that every case begins and every step of commands ends with (4.3.2, 4.4, 4.7.3)."""


def in_tables(address: int) -> bool:
    """Whether `address` lies among the tables of a case: no DMA should go there."""
    return TABLES <= address < TABLES + TABLES_SIZE


def in_ram(address: int, size: int) -> bool:
    """Whether `size` bytes from `address` lie in RAM."""
    return address >= RAM and address + size <= RAM + RAM_SIZE
