"""What only some profiles have: PASID in the function's config space, and the VATOS page."""

from collections.abc import Callable

from board import DESTINATION, SOURCE, Board, Json
from engine import SUM64
from pool import HUGE, PAGE, Scattered

from viommu.layouts.atos import AtosAddr, AtosSid, AtosType
from viommu.layouts.registers import REGISTER_FRAME_SIZE, Idr2, Register

DATA_SIZE = HUGE
PASID, CONTROL = 0x1B, 6
SUBSTREAM = 5


def pasid(board: Board) -> dict[str, Json]:
    """DMA with a SubstreamID before PASID Enable, after it, and after it is cleared again."""
    driver = board.fresh()
    engine = board.engines[0]
    domain = driver.create_domain()
    source, destination = Scattered(board.source, 1), Scattered(board.destination, 1)
    domain.map_pages(SOURCE, source.frames)
    domain.map_pages(DESTINATION, destination.frames)
    driver.attach(engine.stream_id, domain, substream_id=SUBSTREAM, substream_bits=4)
    capability = engine.function.extended_capability(PASID)
    if not capability:
        return {"capability": 0}
    at_reset = engine.function.config(capability + CONTROL)
    before = board.refused(SUM64, SOURCE, substream_id=SUBSTREAM)
    engine.function.set_config(capability + CONTROL, 1)
    enabled = board.copy(source, destination, SOURCE, DESTINATION, substream_id=SUBSTREAM)
    none = board.refused(SUM64, SOURCE, substream_id=SUBSTREAM + 1)
    engine.function.set_config(capability + CONTROL, 0)
    after = board.refused(SUM64, SOURCE, substream_id=SUBSTREAM)
    return {
        "capability": capability,
        "at_reset": at_reset,
        "before": before,
        "enabled": enabled,
        "none": none,
        "after": after,
    }


def vatos(board: Board) -> dict[str, Json]:
    """What the VATOS page says of a mapped page, of one that is not mapped, and of it all for another VMID."""
    driver = board.fresh()
    engine = board.engines[0]
    domain = driver.create_domain()
    frame = Scattered(board.source, 1).frames[0]
    domain.map_pages(SOURCE, [frame])
    driver.attach(engine.stream_id, domain)
    registers = board.registers
    place = Idr2(registers.read32(Register.IDR2)).ba_vatos
    control = REGISTER_FRAME_SIZE + 0x1_0000 * place + 0xA00

    def ask(address: int, vmid: int) -> str:
        registers.write32(Register.VATOS_SEL, vmid)
        registers.write64(control + 0x08, AtosSid(stream_id=engine.stream_id).value)
        query = AtosAddr(address=address, type=AtosType.STAGE_1, rnw=True, pnu=True)
        registers.write64(control + 0x10, query.value)
        registers.write32(control, 1)
        while registers.read32(control):
            pass
        return hex(registers.read64(control + 0x18))

    return {
        "idr0": registers.read32(Register.IDR0),
        "frame": frame,
        "mapped": ask(SOURCE, 0),
        "unmapped": ask(SOURCE + PAGE, 0),
        "other_vmid": ask(SOURCE, 1),
    }


CASES: dict[str, Callable[[Board], dict[str, Json]]] = {"pasid": pasid, "vatos": vatos}
