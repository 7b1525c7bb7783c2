"""What each command does, but for CMD_SYNC (IHI 0070, 4.2 to 4.6)."""

from collections.abc import Callable

from viommu.layouts.commands import (
    ATC_INVALIDATE_ALL,
    CFGI_ALL_RANGE,
    AtcInvalidateCommand,
    Command,
    Opcode,
    PriResponse,
    PriResponseCommand,
    ResumeCommand,
    StreamCommand,
    TlbiCommand,
)
from viommu.smmu.ats_port import AtsPort, InvalidateRequest
from viommu.smmu.configuration import Configuration
from viommu.smmu.features import Features
from viommu.smmu.pri_queue import PageRequestQueue, PageResponse, ResponseCode
from viommu.smmu.stall import StallTable
from viommu.smmu.tlb import STAGE_2, Tlb, World

_PAGE = 1 << 12
_RANGE_SHIFTS = {1: (12, 21, 30), 2: (14, 25), 3: (16, 29, 42)}
# log2 of what a page, and a block of level 2 and of level 1 maps, by TG of a TLBI (4.4.1.1).

_RESPONSES = {
    PriResponse.RESPONSE_FAILURE: ResponseCode.RESPONSE_FAILURE,
    PriResponse.INVALID_REQUEST: ResponseCode.INVALID_REQUEST,
    PriResponse.SUCCESS: ResponseCode.SUCCESS,
}

_ALWAYS = frozenset(
    {
        Opcode.CMD_PREFETCH_CONFIG,
        Opcode.CMD_PREFETCH_ADDR,
        Opcode.CMD_CFGI_STE,
        Opcode.CMD_CFGI_STE_RANGE,
        Opcode.CMD_TLBI_NSNH_ALL,
    }
)
_OF_STAGE_1 = frozenset(
    {
        Opcode.CMD_CFGI_CD,
        Opcode.CMD_CFGI_CD_ALL,
        Opcode.CMD_TLBI_NH_ALL,
        Opcode.CMD_TLBI_NH_ASID,
        Opcode.CMD_TLBI_NH_VA,
        Opcode.CMD_TLBI_NH_VAA,
    }
)
_OF_STAGE_2 = frozenset({Opcode.CMD_TLBI_S12_VMALL, Opcode.CMD_TLBI_S2_IPA})
_OF_EL2 = frozenset(
    {
        Opcode.CMD_TLBI_EL2_ALL,
        Opcode.CMD_TLBI_EL2_ASID,
        Opcode.CMD_TLBI_EL2_VA,
        Opcode.CMD_TLBI_EL2_VAA,
    }
)
_OF_ATS = frozenset({Opcode.CMD_ATC_INV})
_OF_PRI = frozenset({Opcode.CMD_PRI_RESP})
_OF_STALLS = frozenset({Opcode.CMD_RESUME, Opcode.CMD_STALL_TERM})
_BY_ADDRESS = frozenset(
    {
        Opcode.CMD_TLBI_NH_VA,
        Opcode.CMD_TLBI_NH_VAA,
        Opcode.CMD_TLBI_EL2_VA,
        Opcode.CMD_TLBI_EL2_VAA,
        Opcode.CMD_TLBI_S2_IPA,
    }
)


class CommandEffects:
    """Applies commands to the caches and to stalled transactions."""

    def __init__(
        self,
        features: Features,
        configuration: Configuration,
        tlb: Tlb,
        stalls: StallTable,
        ats_port: AtsPort,
        page_requests: PageRequestQueue,
        *,
        prefetch: Callable[[StreamCommand], None],
        enabled: Callable[[], bool],
        answered: Callable[[], None],
    ) -> None:
        self._configuration = configuration
        self._tlb = tlb
        self._stalls = stalls
        self._ats_port = ats_port
        self._page_requests = page_requests
        self._prefetch = prefetch
        self._enabled = enabled  # SMMUEN
        self._substreams = bool(features.substream_id_bits)
        self._answered = answered
        self._ranges = features.range_invalidation
        self._asid_mask = (1 << features.asid_bits) - 1
        # Without a stage 2 there is one VMID, and the field is ignored (4.4).
        self._vmid_mask = (1 << features.vmid_bits) - 1 if features.stage_2 else 0
        self._legal = _ALWAYS
        for implemented, opcodes in (
            (features.stage_1, _OF_STAGE_1),
            (features.stage_2, _OF_STAGE_2),
            (features.el2, _OF_EL2),
            (features.stalls, _OF_STALLS),
            (features.ats, _OF_ATS),
            (features.pri, _OF_PRI),
        ):
            if implemented:
                self._legal |= opcodes
        self.invalidated = False
        """Something was invalidated since this was last cleared: a CMD_SYNC has to wait."""

    def apply(self, command: Command) -> bool:
        """The effect of `command`; False when it is ILLEGAL here."""
        if command.opcode not in self._legal:
            return False
        if isinstance(command, TlbiCommand):
            if self._is_reserved(command):
                return False
            self._invalidate(command)
            self.invalidated = True
        elif isinstance(command, AtcInvalidateCommand):
            return self._invalidate_atc(command)
        elif isinstance(command, PriResponseCommand):
            return self._respond(command)
        elif isinstance(command, StreamCommand | ResumeCommand):
            if command.ssec:  # secure streams are not ours to name (4.1.6)
                return False
            if isinstance(command, ResumeCommand):
                self._answer(command)
            else:
                self._apply_to_stream(command)
        return True

    def _apply_to_stream(self, command: StreamCommand) -> None:
        configuration, stream_id = self._configuration, command.stream_id
        match command.opcode:
            case Opcode.CMD_PREFETCH_CONFIG | Opcode.CMD_PREFETCH_ADDR:
                self._prefetch(command)
                return
            case Opcode.CMD_CFGI_STE:
                configuration.invalidate_streams(stream_id)
            case Opcode.CMD_CFGI_STE_RANGE if command.leaf_or_range == CFGI_ALL_RANGE:
                configuration.invalidate_all()
            case Opcode.CMD_CFGI_STE_RANGE:
                configuration.invalidate_streams(stream_id, command.leaf_or_range + 1)
            case Opcode.CMD_CFGI_CD:
                configuration.invalidate_cd(stream_id, command.substream_id)
            case _:
                configuration.invalidate_cds(stream_id)
        self.invalidated = True

    def holds(self, command: Command) -> bool:
        """`command` cannot be sent before a function has answered an earlier one."""
        return isinstance(command, AtcInvalidateCommand) and self._ats_port.full(command.stream_id)

    def _invalidate_atc(self, command: AtcInvalidateCommand) -> bool:
        """CMD_ATC_INV; a size above 52 is ILLEGAL: a choice. Ignored while SMMUEN is 0 (4.5.1)."""
        if command.span_log2 > ATC_INVALIDATE_ALL:
            return False
        if self._enabled():
            size = _PAGE << command.span_log2
            # Without SubstreamIDs SSV behaves as 0: a choice.
            ssv = command.ssv and self._substreams
            self._ats_port.invalidate(
                command.stream_id,
                InvalidateRequest(
                    command.substream_id if ssv else None,
                    command.address & -size,
                    size,
                    ssv and command.global_,
                ),
            )
            self.invalidated = True
        return True

    def _respond(self, command: PriResponseCommand) -> bool:
        """CMD_PRI_RESP, ignored while SMMUEN is 0 (4.5.2)."""
        code = _RESPONSES.get(command.response)
        if code is None:
            return False
        if self._enabled():
            ssv = command.ssv and self._substreams
            self._page_requests.send(
                command.stream_id,
                PageResponse(command.prg_index, code, command.substream_id if ssv else None),
            )
        return True

    def _answer(self, command: ResumeCommand) -> None:
        """CMD_RESUME and CMD_STALL_TERM. IDR0.TERM_MODEL is 1: to terminate is to abort (4.7.1)."""
        if command.opcode == Opcode.CMD_STALL_TERM:
            self._stalls.terminate(command.stream_id)
        else:
            answer = "retry" if command.retry else "abort"
            self._stalls.resume(command.stream_id, command.stag, answer)
        self._answered()

    def _invalidate(self, command: TlbiCommand) -> None:
        tlb = self._tlb
        asid, vmid = command.asid & self._asid_mask, command.vmid & self._vmid_mask
        # CR2.E2H says which of the regimes of EL2 is meant; the one without it has no ASIDs (4.4.2.8).
        el2 = World.EL2_E2H if self._configuration.e2h else World.EL2
        match command.opcode:
            case Opcode.CMD_TLBI_NSNH_ALL:
                tlb.invalidate_world(World.EL1)
            case Opcode.CMD_TLBI_NH_ALL:
                tlb.invalidate_vmid(World.EL1, vmid)
            case Opcode.CMD_TLBI_S12_VMALL:
                tlb.invalidate_vmid(World.EL1, vmid, stage_2=True)
            case Opcode.CMD_TLBI_NH_ASID:
                tlb.invalidate_asid(World.EL1, vmid, asid)
            case Opcode.CMD_TLBI_NH_VA:
                self._invalidate_addresses(World.EL1, vmid, asid, command)
            case Opcode.CMD_TLBI_NH_VAA:
                self._invalidate_addresses(World.EL1, vmid, None, command)
            case Opcode.CMD_TLBI_S2_IPA:
                self._invalidate_addresses(World.EL1, vmid, STAGE_2, command)
            case Opcode.CMD_TLBI_EL2_ALL:
                tlb.invalidate_world(World.EL2)
                tlb.invalidate_world(World.EL2_E2H)
            case Opcode.CMD_TLBI_EL2_ASID:
                tlb.invalidate_asid(World.EL2_E2H, 0, asid)
            case Opcode.CMD_TLBI_EL2_VA if el2 is World.EL2_E2H:
                self._invalidate_addresses(el2, 0, asid, command)
            case _:
                self._invalidate_addresses(el2, 0, None, command)

    def _is_reserved(self, command: TlbiCommand) -> bool:
        """A granule, and neither a range nor a level to go with it (4.4.1.1)."""
        return (
            command.opcode in _BY_ADDRESS
            and self._ranges
            and command.tg != 0
            and not command.num | command.scale | self._level(command)
        )

    @staticmethod
    def _level(command: TlbiCommand) -> int:
        """TTL; there are no blocks of level 1 with the 16 KiB granule, and 1 says nothing there."""
        return 0 if (command.tg, command.ttl) == (2, 1) else command.ttl

    def _invalidate_addresses(
        self, world: World, vmid: int, asid: int | None, command: TlbiCommand
    ) -> None:
        """One address, or with range invalidation (NUM + 1) × 2^SCALE granules of TG (4.4.1.1).

        Only what was mapped with that granule, at the level of TTL, has to go, and only that does.
        """
        if not self._ranges or not command.tg:
            self._tlb.invalidate_address(world, vmid, asid, command.address)
            return
        shifts = _RANGE_SHIFTS[command.tg]
        size = (command.num + 1) << command.scale + shifts[0]
        level = self._level(command)
        if level:
            shifts = (shifts[3 - level],)
        self._tlb.invalidate_range(world, vmid, asid, command.address, size, shifts)
