"""Guest memory: regions, holes, read-only and unmapped ranges, bus errors."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from viommu import hot
from viommu.memory import BusError, GuestMemory

A, B, ROM, NOTHING = 0x1000, 0x2000, 0x3000, 0x4000


@pytest.fixture
def ram() -> dict[int, bytearray]:
    return {base: bytearray([base >> 12]) * 0x1000 for base in (A, B, ROM)}


@pytest.fixture
def memory(ram: dict[int, bytearray]) -> GuestMemory:
    """Two adjacent regions of RAM, a ROM, and a range that is known and not accessible."""
    memory = GuestMemory()
    memory.add_region(NOTHING, 0x1000, None)
    memory.add_region(B, 0x1000, memoryview(ram[B]))
    memory.add_region(ROM, 0x1000, memoryview(ram[ROM]), writable=False)
    memory.add_region(A, 0x1000, memoryview(ram[A]))
    return memory


def test_regions_are_listed_in_order(memory: GuestMemory) -> None:
    assert memory.regions == [
        (A, 0x1000, True),
        (B, 0x1000, True),
        (ROM, 0x1000, True),
        (NOTHING, 0x1000, False),
    ]
    memory.remove_region(B, 0x1000)
    assert [base for base, _, _ in memory.regions] == [A, ROM, NOTHING]
    memory.clear()
    assert memory.regions == []


@pytest.mark.parametrize(
    ("base", "size", "length"),
    [
        (0x1800, 0x10, 0x10),
        (0x800, 0x1000, 0x1000),
        (0x800, 0x5000, 0x5000),
        (0x1000, 0x1000, 0x1000),
        (0x8000, 0, 0),
        (0x8000, -1, 0),
        (0x8000, 0x10, 0x20),
    ],
)
def test_wrong_regions_are_refused(memory: GuestMemory, base: int, size: int, length: int) -> None:
    before = memory.regions
    with pytest.raises(ValueError, match="region"):
        memory.add_region(base, size, memoryview(bytearray(length)))
    assert memory.regions == before


@pytest.mark.parametrize(("base", "size"), [(A, 0x800), (A + 1, 0x1000), (0, 1), (0x9000, 1)])
def test_only_what_was_added_can_be_removed(memory: GuestMemory, base: int, size: int) -> None:
    with pytest.raises(ValueError, match="no region"):
        memory.remove_region(base, size)


def test_access_within_and_across_regions(memory: GuestMemory, ram: dict[int, bytearray]) -> None:
    assert memory.read(B - 2, 4) == b"\x01\x01\x02\x02"
    memory.write(B - 2, b"wxyz")
    assert ram[A][-2:] == b"wx"
    assert ram[B][:2] == b"yz"
    assert memory.read(ROM, 3) == b"\x03\x03\x03"
    assert memory.read(A, 0x3000) == bytes(ram[A] + ram[B] + ram[ROM])


@pytest.mark.parametrize(
    "address", [0, A - 1, NOTHING, NOTHING + 0xFFF, 0x5000, 1 << 51, (1 << 64) - 8]
)
def test_bus_errors(memory: GuestMemory, address: int) -> None:
    for attempt in (
        lambda: memory.read(address, 8),
        lambda: memory.write(address, b"12345678"),
        lambda: memory.load_u32(address),
        lambda: memory.load_u64(address),
        lambda: memory.store_u32(address, 1),
        lambda: memory.store_u64(address, 1),
        lambda: memory.view(address, 8),
    ):
        with pytest.raises(BusError):
            attempt()


def test_a_bus_error_tells_where_and_how_far(
    memory: GuestMemory, ram: dict[int, bytearray]
) -> None:
    with pytest.raises(BusError, match="bus error at 0x3000") as caught:
        memory.write(ROM - 4, b"12345678")
    assert (caught.value.address, caught.value.size, caught.value.done) == (ROM, 4, 4)
    assert ram[B][-4:] == b"1234"
    assert ram[ROM] == b"\x03" * 0x1000
    buffer = bytearray(24)
    with pytest.raises(BusError) as caught:
        memory.gather(array("Q", (A, 8, NOTHING - 4, 8, B, 8)), buffer)
    assert (caught.value.address, caught.value.size, caught.value.done) == (NOTHING, 4, 12)
    assert buffer == b"\x01" * 8 + b"\x03" * 4 + bytes(12)


def test_loads_and_stores(memory: GuestMemory, ram: dict[int, bytearray]) -> None:
    memory.store_u64(A + 8, 0x0123_4567_89AB_CDEF)
    assert ram[A][8:16] == bytes.fromhex("efcdab8967452301")
    assert memory.load_u64(A + 8) == 0x0123_4567_89AB_CDEF
    assert memory.load_u32(A + 12) == 0x0123_4567
    memory.store_u32(A + 12, 0xFFFF_FFFF)
    assert memory.load_u64(A + 8) == 0xFFFF_FFFF_89AB_CDEF
    # Unaligned, and across two regions.
    memory.store_u64(B - 3, 0x1122_3344_5566_7788)
    assert memory.load_u64(B - 3) == 0x1122_3344_5566_7788
    memory.store_u32(B - 1, 0xAABB_CCDD)
    assert memory.load_u32(B - 1) == 0xAABB_CCDD
    for store in (memory.store_u32, memory.store_u64):
        with pytest.raises(BusError):
            store(ROM, 1)
    assert memory.load_u64(ROM) == 0x0303_0303_0303_0303


def test_a_region_of_odd_size_or_place() -> None:
    memory = GuestMemory()
    data = bytearray(range(13))
    memory.add_region(3, 13, memoryview(data))
    assert memory.load_u64(8) == int.from_bytes(data[5:13], "little")
    memory.store_u32(4, 0xAABB_CCDD)
    assert data[1:5] == bytes.fromhex("ddccbbaa")
    with pytest.raises(BusError):
        memory.load_u64(16)


def test_a_read_only_view_is_a_read_only_region() -> None:
    memory = GuestMemory()
    memory.add_region(0, 8, memoryview(b"12345678"))
    assert memory.read(0, 8) == b"12345678"
    with pytest.raises(BusError):
        memory.store_u64(0, 0)
    with pytest.raises(BusError):
        memory.write(0, b"1")


def test_a_write_only_region_cannot_be_read() -> None:
    data = bytearray(16)
    memory = GuestMemory()
    memory.add_region(0, 16, memoryview(data), readable=False)
    memory.write(0, b"xyz")
    memory.store_u64(8, 1)
    assert data[:3] == b"xyz"
    for attempt in (
        lambda: memory.read(0, 1),
        lambda: memory.load_u64(8),
        lambda: memory.view(0, 1),
    ):
        with pytest.raises(BusError):
            attempt()


def test_a_view_is_the_memory_itself(memory: GuestMemory, ram: dict[int, bytearray]) -> None:
    view = memory.view(A + 0x10, 0x20)
    view[0] = 0x77
    assert ram[A][0x10] == 0x77
    view.release()
    with pytest.raises(BusError):
        memory.view(B - 4, 8)


def test_removal_lets_go_of_the_view(memory: GuestMemory, ram: dict[int, bytearray]) -> None:
    buffer = bytearray(16)
    memory.gather(array("Q", (A, 8, B, 8)), buffer)  # so that C knows the regions
    assert memory.load_u64(A) == memory.load_u32(A) | memory.load_u32(A) << 32
    memory.remove_region(A, 0x1000)
    ram[A].extend(b"x")  # a bytearray with an exported buffer would refuse
    with pytest.raises(BusError):
        memory.load_u64(A)
    with pytest.raises(BusError):
        memory.gather(array("Q", (B, 8, A, 8)), buffer)
    # The place is free for another region.
    memory.add_region(A, 8, memoryview(b"abcdefgh"))
    assert memory.read(A, 8) == b"abcdefgh"


def test_a_buffer_of_another_length_is_refused(memory: GuestMemory) -> None:
    for length in (15, 17):
        for runs in ((A, 8, B, 8), (A, 16)):
            with pytest.raises(ValueError, match="differ in length"):
                memory.gather(array("Q", runs), bytearray(length))
            with pytest.raises(ValueError, match="differ in length"):
                memory.scatter(array("Q", runs), bytearray(length))


# Against a flat model: regions with holes, one read-only, one inaccessible.

REGIONS = [
    (0x10, 0x30, "rw"),
    (0x40, 0x20, "r"),
    (0x60, 0x18, "rw"),
    (0x80, 0x20, "-"),
    (0xA0, 0x11, "rw"),
]
SPACE = 0xC0
RUNS = st.lists(st.tuples(st.integers(0, SPACE), st.integers(0, 0x30)), max_size=8)


def build() -> tuple[GuestMemory, list[bytearray]]:
    memory, parts = GuestMemory(), []
    for base, size, access in REGIONS:
        data = bytearray((base + i) & 0xFF for i in range(size))
        parts.append(data)
        view = None if access == "-" else memoryview(data)
        memory.add_region(base, size, view, writable="w" in access)
    return memory, parts


@settings(max_examples=400, deadline=None)
@given(RUNS, st.booleans(), st.booleans())
def test_moves_match_a_flat_model(
    pieces: list[tuple[int, int]], to_guest: bool, compiled: bool
) -> None:
    memory, parts = build()
    flat: dict[int, tuple[bytearray, int, str]] = {}
    for (base, size, access), part in zip(REGIONS, parts, strict=True):
        flat.update({base + i: (part, i, access) for i in range(size)})
    needed = "w" if to_guest else "r"
    reachable = []
    for address in (start + i for start, length in pieces for i in range(length)):
        if needed not in flat.get(address, (None, 0, ""))[2]:
            break
        reachable.append(address)
    total = sum(length for _, length in pieces)
    buffer = bytearray((7 * i + 1) & 0xFF for i in range(total))
    images = [bytes(part) for part in parts]
    expected_buffer = bytearray(buffer)
    for index, address in enumerate(reachable):
        part, offset, _ = flat[address]
        if not to_guest:
            expected_buffer[index] = part[offset]
    flat_runs = array("Q", [value for piece in pieces for value in piece])
    table = hot.RegionTable(
        [(r.base, r.size, r.bytes, r.readable, r.writable) for r in memory._regions]
    )
    done = (
        table.move(flat_runs, buffer, to_guest=to_guest)
        if compiled
        else memory._move_python(flat_runs, buffer, to_guest)
    )
    assert done == len(reachable)
    if to_guest:
        for index, address in enumerate(reachable):
            part, offset, _ = flat[address]
            image = bytearray(images[next(i for i, p in enumerate(parts) if p is part)])
            image[offset] = buffer[index]
            images[next(i for i, p in enumerate(parts) if p is part)] = bytes(image)
    else:
        assert buffer == expected_buffer
    assert [bytes(part) for part in parts] == images


@settings(max_examples=200, deadline=None)
@given(RUNS, st.booleans())
def test_what_is_raised_is_located(pieces: list[tuple[int, int]], to_guest: bool) -> None:
    memory, _ = build()
    flat_runs = array("Q", [value for piece in pieces for value in piece])
    buffer = bytearray(sum(length for _, length in pieces))
    move = memory.scatter if to_guest else memory.gather
    error = None
    try:
        move(flat_runs, buffer)
    except BusError as caught:
        error = caught
    if error is not None:
        addresses = [start + i for start, length in pieces for i in range(length)]
        assert error.address == addresses[error.done]
