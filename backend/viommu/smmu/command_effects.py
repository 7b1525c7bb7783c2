"""What each command does, but for CMD_SYNC (IHI 0070, 4.2 to 4.6)."""

from collections.abc import Callable
from typing import Any

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
        self._effects = self._legal(features)
        self.invalidated = False
        """Something was invalidated since this was last cleared: a CMD_SYNC has to wait."""

    def _legal(self, features: Features) -> dict[int, Callable[[Any], bool]]:
        """What each command does where it is not ILLEGAL; it returns False when the command's fields make it so."""
        effects: dict[int, Callable[[Any], bool]] = {
            Opcode.CMD_PREFETCH_CONFIG: self._of_stream(self._prefetch),
            Opcode.CMD_PREFETCH_ADDR: self._of_stream(self._prefetch),
            Opcode.CMD_CFGI_STE: self._of_stream(self._forget_ste),
            Opcode.CMD_CFGI_STE_RANGE: self._of_stream(self._forget_stes),
            Opcode.CMD_TLBI_NSNH_ALL: self._tlbi(lambda _: self._tlb.invalidate_world(World.EL1)),
        }
        if features.stage_1:
            effects |= {
                Opcode.CMD_CFGI_CD: self._of_stream(self._forget_cd),
                Opcode.CMD_CFGI_CD_ALL: self._of_stream(self._forget_cds),
                Opcode.CMD_TLBI_NH_ALL: self._tlbi(self._tlbi_nh_all),
                Opcode.CMD_TLBI_NH_ASID: self._tlbi(self._tlbi_nh_asid),
                Opcode.CMD_TLBI_NH_VA: self._tlbi_addresses(World.EL1, _own_asid),
                Opcode.CMD_TLBI_NH_VAA: self._tlbi_addresses(World.EL1, _every_asid),
            }
        if features.stage_2:
            effects |= {
                Opcode.CMD_TLBI_S12_VMALL: self._tlbi(self._tlbi_s12_vmall),
                Opcode.CMD_TLBI_S2_IPA: self._tlbi_addresses(World.EL1, lambda _: STAGE_2),
            }
        if features.el2:
            effects |= {
                Opcode.CMD_TLBI_EL2_ALL: self._tlbi(self._tlbi_el2_all),
                Opcode.CMD_TLBI_EL2_ASID: self._tlbi(self._tlbi_el2_asid),
                Opcode.CMD_TLBI_EL2_VA: self._tlbi_addresses(World.EL2, _own_asid),
                Opcode.CMD_TLBI_EL2_VAA: self._tlbi_addresses(World.EL2, _every_asid),
            }
        if features.stalls:
            effects |= {Opcode.CMD_RESUME: self._resume, Opcode.CMD_STALL_TERM: self._terminate}
        if features.ats:
            effects[Opcode.CMD_ATC_INV] = self._invalidate_atc
        if features.pri:
            effects[Opcode.CMD_PRI_RESP] = self._respond
        return effects

    def apply(self, command: Command) -> bool:
        """The effect of `command`; False when it is ILLEGAL here."""
        effect = self._effects.get(command.opcode)
        return effect is not None and effect(command)

    # Configuration (4.2, 4.3)

    @staticmethod
    def _of_stream(effect: Callable[[StreamCommand], None]) -> Callable[[StreamCommand], bool]:
        def apply(command: StreamCommand) -> bool:
            if command.ssec:  # secure streams are not ours to name (4.1.6)
                return False
            effect(command)
            return True

        return apply

    def _forget_ste(self, command: StreamCommand) -> None:
        self._configuration.invalidate_streams(command.stream_id)
        self.invalidated = True

    def _forget_stes(self, command: StreamCommand) -> None:
        if command.leaf_or_range == CFGI_ALL_RANGE:
            self._configuration.invalidate_all()
        else:
            self._configuration.invalidate_streams(command.stream_id, command.leaf_or_range + 1)
        self.invalidated = True

    def _forget_cd(self, command: StreamCommand) -> None:
        self._configuration.invalidate_cd(command.stream_id, command.substream_id)
        self.invalidated = True

    def _forget_cds(self, command: StreamCommand) -> None:
        self._configuration.invalidate_cds(command.stream_id)
        self.invalidated = True

    # Functions behind ATS and PRI, and stalls (4.5, 4.6)

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

    def _resume(self, command: ResumeCommand) -> bool:
        """CMD_RESUME. IDR0.TERM_MODEL is 1: to terminate is to abort (4.7.1)."""
        if command.ssec:
            return False
        answer = "retry" if command.retry else "abort"
        self._stalls.resume(command.stream_id, command.stag, answer)
        self._answered()
        return True

    def _terminate(self, command: ResumeCommand) -> bool:
        """CMD_STALL_TERM."""
        if command.ssec:
            return False
        self._stalls.terminate(command.stream_id)
        self._answered()
        return True

    # The TLB (4.4)

    def _tlbi(self, effect: Callable[[TlbiCommand], None]) -> Callable[[TlbiCommand], bool]:
        def apply(command: TlbiCommand) -> bool:
            effect(command)
            self.invalidated = True
            return True

        return apply

    def _tlbi_nh_all(self, command: TlbiCommand) -> None:
        self._tlb.invalidate_vmid(World.EL1, command.vmid & self._vmid_mask)

    def _tlbi_s12_vmall(self, command: TlbiCommand) -> None:
        self._tlb.invalidate_vmid(World.EL1, command.vmid & self._vmid_mask, stage_2=True)

    def _tlbi_nh_asid(self, command: TlbiCommand) -> None:
        vmid, asid = command.vmid & self._vmid_mask, command.asid & self._asid_mask
        self._tlb.invalidate_asid(World.EL1, vmid, asid)

    def _tlbi_el2_all(self, _: TlbiCommand) -> None:
        self._tlb.invalidate_world(World.EL2)
        self._tlb.invalidate_world(World.EL2_E2H)

    def _tlbi_el2_asid(self, command: TlbiCommand) -> None:
        self._tlb.invalidate_asid(World.EL2_E2H, 0, command.asid & self._asid_mask)

    def _tlbi_addresses(
        self, world: World, select: Callable[[TlbiCommand], int | None]
    ) -> Callable[[TlbiCommand], bool]:
        """An invalidation by address in `world`, of the ASID that `select` takes from the command; None is of all."""

        def apply(command: TlbiCommand) -> bool:
            if self._is_reserved(command):
                return False
            asid = select(command)
            if asid is not None and asid != STAGE_2:
                asid &= self._asid_mask
            if world is World.EL1:
                self._invalidate_addresses(world, command.vmid & self._vmid_mask, asid, command)
            elif self._configuration.e2h:
                self._invalidate_addresses(World.EL2_E2H, 0, asid, command)
            else:
                # CR2.E2H says which of the regimes of EL2 is meant; the one without it has no ASIDs (4.4.2.8).
                self._invalidate_addresses(world, 0, None, command)
            self.invalidated = True
            return True

        return apply

    def _is_reserved(self, command: TlbiCommand) -> bool:
        """A granule, and neither a range nor a level to go with it (4.4.1.1)."""
        return (
            self._ranges
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


def _own_asid(command: TlbiCommand) -> int | None:
    return command.asid


def _every_asid(_: TlbiCommand) -> int | None:
    return None
