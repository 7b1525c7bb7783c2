"""What a volatile write cache holds back, and what it lets go of."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.disk_tools import flush
from tests.nvme_rig import BLOCK, DATA, FLUSH, PAGE, SET_FEATURES, WRITE, NvmeRig
from viommu.disks import open_disk
from viommu.endpoints.nvme.store import BlockStore, RamDisk
from viommu.endpoints.nvme.write_cache import RUN, WriteCache

SIZE = 8 * PAGE - BLOCK
FORCE_UNIT_ACCESS = 1 << 30


def content(store: BlockStore) -> bytes:
    found = bytearray(store.size)
    store.read(0, memoryview(found))
    return bytes(found)


RANGES = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda each: (each[0], min(each[1], SIZE - each[0]))
)
STEPS = st.lists(st.tuples(st.sampled_from(["write", "zero", "flush", "flush it"]), RANGES))


@given(STEPS, st.sampled_from([0, 2 * PAGE, SIZE]))
def test_any_steps(steps: list[tuple[str, tuple[int, int]]], limit: int) -> None:
    """Software sees what it wrote; the store what was flushed, by pages, and what there was no room for."""
    below = RamDisk(SIZE)
    cache = WriteCache(below, limit)
    written, lasting = bytearray(SIZE), bytearray(SIZE)
    waiting = set[int]()
    for number, (step, (offset, size)) in enumerate(steps, start=1):
        pages = set(range(offset // PAGE, -(-(offset + size) // PAGE)))
        match step:
            case "write":
                data = bytes([number % 256]) * size
                cache.write(offset, memoryview(data))
                written[offset : offset + size] = data
                waiting |= pages
            case "zero":
                cache.zero(offset, size)
                written[offset : offset + size] = bytes(size)
                waiting |= pages
            case "flush":
                flush(cache)
            case "flush it":
                flush(cache, offset, size)
        full = len(waiting) * PAGE > limit
        done = waiting if full or step == "flush" else waiting & pages if "flush" in step else set()
        for page in done:
            place = slice(page * PAGE, (page + 1) * PAGE)
            lasting[place] = written[place]
        waiting = waiting - done
        assert content(cache) == written
        assert content(below) == lasting


def test_what_a_controller_makes_last() -> None:
    below = RamDisk(1 << 20)
    rig = NvmeRig(WriteCache(below))
    queue = rig.io()

    def write(block: int, flags: int = 0) -> None:
        rig.write(DATA, bytes([block]) * BLOCK)
        assert queue.do(WRITE, block, 0, flags, nsid=1, prp1=DATA).status == 0

    def lasts(block: int) -> bool:
        found = bytearray(BLOCK)
        below.read(block * BLOCK, memoryview(found))
        return found == bytes([block]) * BLOCK

    write(1)
    assert not lasts(1)
    write(64, FORCE_UNIT_ACCESS)
    assert (lasts(64), lasts(1)) == (True, False), "force unit access is no flush"
    assert queue.do(FLUSH, nsid=1).status == 0
    assert lasts(1)
    write(2)
    rig.admin.do(SET_FEATURES, 6, 0)
    assert lasts(2), "there is no cache any more"
    write(65)
    assert (lasts(65), lasts(2)) == (True, True), "the write cache is off"


class Counting(RamDisk):
    """How many bytes each access had."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.seen: list[tuple[str, int]] = []

    def write(self, offset: int, data: memoryview) -> None:
        self.seen.append(("write", len(data)))
        super().write(offset, data)

    def zero(self, offset: int, size: int) -> None:
        self.seen.append(("zero", size))
        super().zero(offset, size)


def test_adjacent_pages_go_together() -> None:
    """A step each, so that others have their turn."""
    below = Counting(4 << 20)
    cache = WriteCache(below)
    cache.write(0, memoryview(bytes(RUN * PAGE + PAGE)))
    cache.zero(RUN * PAGE + PAGE, 3 * PAGE)
    cache.write(3 << 20, memoryview(b"x"))
    assert len(list(cache.flush())) == 5
    assert below.seen == [
        ("write", RUN * PAGE), ("write", PAGE), ("zero", 3 * PAGE), ("write", PAGE),
    ]  # fmt: skip


@pytest.mark.parametrize("volatile", [False, True])
def test_the_power_is_cut(tmp_path: Path, volatile: bool) -> None:
    path = tmp_path / "disk.raw"
    with open_disk(path, 4 * PAGE, volatile=volatile) as disk:
        disk.write(0, memoryview(b"flushed"))
        flush(disk)
        disk.write(0, memoryview(b"written"))
        found = bytearray(7)
        disk.read(0, memoryview(found))
        assert found == b"written"
    assert path.read_bytes()[:7] == (b"flushed" if volatile else b"written")
