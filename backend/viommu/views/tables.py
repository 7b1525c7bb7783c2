"""The tables of the guest: streams, contexts, the walk of an address, and the domains that they amount to."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from viommu.control import Methods
from viommu.layouts.bitfields import Layout
from viommu.layouts.page_tables import LeafDescriptor, Stage2LeafDescriptor, TableDescriptor
from viommu.layouts.tables import S1Default, SteConfig, StreamTableEntry
from viommu.smmu import Access, Smmu
from viommu.smmu.context import StreamContext, TableBase, cd_max, translates_stage_1
from viommu.smmu.inspection import Descriptor, Inspection, StreamView
from viommu.smmu.tlb import (
    OUTPUT,
    PRIV_EXECUTE,
    PRIV_READ,
    PRIV_WRITE,
    USER_EXECUTE,
    USER_READ,
    USER_WRITE,
)
from viommu.views.scan import Found, page, scan

Address = Annotated[int, Field(ge=0, lt=1 << 64)]
StreamId = Annotated[int, Field(ge=0, lt=1 << 32)]
SubstreamId = Annotated[int, Field(ge=0, lt=1 << 20)]
Limit = Annotated[int, Field(ge=1, le=256)]
Row = dict[str, Any]

_NOTHING = bytes(64)
_ABORT = StreamTableEntry(valid=True, config=SteConfig.ABORT).to_bytes()
_SUBSTREAMS = 16
# How many contexts of a stream are looked at for domains.


class TableViews:
    """Registers `smmu.streams`, `smmu.stream`, `smmu.contexts`, `smmu.walk` and `smmu.domains`."""

    def __init__(self, smmu: Smmu, methods: Methods) -> None:
        self._smmu = smmu
        methods.add("smmu.streams", self.streams)
        methods.add("smmu.stream", self.stream)
        methods.add("smmu.contexts", self.contexts)
        methods.add("smmu.walk", self.walk)
        methods.add("smmu.domains", self.domains)

    def streams(self, first: StreamId = 0, limit: Limit = 64, everything: bool = False) -> Row:
        """List the stream table from `first` on, less what is empty or, but for `everything`, plainly aborts."""
        rows, after = page(
            self._streams(Inspection(self._smmu), first, everything=everything),
            limit,
            lambda number, view: {
                "stream_id": number,
                "state": view.state,
                "address": view.ste_address,
                "fields": None if view.ste is None else view.ste.as_dict(),
            },
        )
        return {"enabled": self._smmu.transactions.enabled, "streams": rows, "next": after}

    def stream(self, stream_id: StreamId, substream_id: SubstreamId | None = None) -> Row:
        """Show what governs a stream, or a substream: its STE and its CD, as they are in memory."""
        view = Inspection(self._smmu).stream(stream_id, substream_id)
        return {
            "stream_id": stream_id,
            "substream_id": substream_id,
            **_governing(view),
        }

    def contexts(self, stream_id: StreamId, first: SubstreamId = 0, limit: Limit = 64) -> Row:
        """List the CDs of a stream from SubstreamID `first` on, without what is empty."""
        inspection = Inspection(self._smmu)
        rows, after = page(
            self._contexts(inspection, stream_id, first),
            limit,
            lambda number, view: {
                "substream_id": number,
                "state": view.state,
                "address": view.cd_address,
                "fields": None if view.cd is None else view.cd.as_dict(),
            },
        )
        state = inspection.stream(stream_id).state
        return {"stream_id": stream_id, "state": state, "contexts": rows, "next": after}

    def walk(
        self,
        stream_id: StreamId,
        iova: Address,
        substream_id: SubstreamId | None = None,
        write: bool = False,
        privileged: bool = False,
        instruction: bool = False,
    ) -> Row:
        """Walk the tables for an address, as they are in memory: each descriptor, and where it ends."""
        inspection = Inspection(self._smmu)
        access = Access(stream_id, substream_id, write, privileged, instruction)
        view = inspection.stream(stream_id, substream_id)
        walk = inspection.walk(access, iova)
        found: Row = {"address": None, "size": None, "permissions": None, "fault": walk.fault}
        if walk.entry is not None:
            inside = (1 << walk.entry.shift) - 1
            found["address"] = walk.entry.slot & OUTPUT & ~inside | iova & inside
            found["size"] = inside + 1
            found["permissions"] = permissions(walk.entry.slot)
        elif view.state == "bypass":
            runs, found["fault"] = inspection.translate(view, access, iova, 1)
            found["address"] = runs[0] if runs else None
        return {
            "stream_id": stream_id,
            "substream_id": substream_id,
            "iova": iova,
            "enabled": self._smmu.transactions.enabled,
            **_governing(view),
            "descriptors": [_descriptor(each) for each in walk.descriptors],
            **found,
        }

    def domains(self, first: StreamId = 0, limit: Limit = 64) -> Row:
        """List the guest's domains, as far as its tables tell: what translates, and for which streams."""
        inspection = Inspection(self._smmu)
        domains: dict[object, Row] = {}

        def note(stream_id: int, substream_id: int | None, view: StreamView) -> None:
            domain = domains.setdefault(
                view.context or view.state, {**_domain(view.state, view.context), "streams": []}
            )
            domain["streams"].append({"stream_id": stream_id, "substream_id": substream_id})

        def follow(stream_id: int, view: StreamView) -> None:
            if view.ste is not None and cd_max(view.ste, self._smmu.features):
                page(
                    self._contexts(inspection, stream_id, 0),
                    _SUBSTREAMS,
                    lambda number, inner: note(stream_id, number, inner),
                    groups=1,
                )
            else:
                note(stream_id, None, view)

        _, after = page(self._streams(inspection, first), limit, follow)
        enabled = self._smmu.transactions.enabled
        return {"enabled": enabled, "domains": list(domains.values()), "next": after}

    def _streams(
        self, inspection: Inspection, first: int, *, everything: bool = False
    ) -> Iterator[Found]:
        def look(stream_id: int) -> tuple[StreamView, int | None]:
            view = inspection.stream(stream_id)
            return view, view.ste_address

        smmu = self._smmu
        bits = min(smmu.configuration.base_cfg.log2size, smmu.features.stream_id_bits)
        plain = {_NOTHING} if everything else {_NOTHING, _ABORT}
        return scan(smmu.memory, first, 1 << bits, look, plain)

    def _contexts(self, inspection: Inspection, stream_id: int, first: int) -> Iterator[Found]:
        view = inspection.stream(stream_id)
        ste = view.ste
        if ste is None or not translates_stage_1(ste) or view.state == "C_BAD_STE":
            return iter(())
        bits = cd_max(ste, self._smmu.features)
        # Where CD 0 is for those without a SubstreamID, nobody else may ask for it (5.2, S1DSS).
        unasked = not bits or ste.s1_dss == S1Default.SUBSTREAM_0

        def look(number: int) -> tuple[StreamView, int | None]:
            view = inspection.stream(stream_id, number if number or not unasked else None)
            return view, view.cd_address

        return scan(self._smmu.memory, first, 1 << bits, look, {_NOTHING})


def permissions(slot: int) -> str:
    """`rwx` of what is privileged, and of what is not."""
    return "/".join(
        "".join(letter if slot & flag else "-" for letter, flag in zip("rwx", flags, strict=True))
        for flags in (
            (PRIV_READ, PRIV_WRITE, PRIV_EXECUTE),
            (USER_READ, USER_WRITE, USER_EXECUTE),
        )
    )


def _governing(view: StreamView) -> Row:
    return {
        "state": view.state,
        "ste": _structure(view.ste_address, view.ste),
        "cd": _structure(view.cd_address, view.cd),
    }


def _structure(address: int | None, content: Layout | None) -> Row | None:
    if content is None:
        return None
    return {"address": address, "fields": content.as_dict(), "words": content.qwords()}


def _descriptor(read: Descriptor) -> Row:
    kind, layout = _kind(read)
    return {
        "stage": read.stage,
        "level": read.level,
        "address": read.address,
        "value": read.content,
        "kind": kind,
        "fields": layout(read.content).as_dict(),
    }


def _kind(read: Descriptor) -> tuple[str, type[Layout]]:
    leaf = Stage2LeafDescriptor if read.stage == 2 else LeafDescriptor
    match read.content & 3:
        case 3 if read.level == 3:
            return "page", leaf
        case 3:
            return "table", TableDescriptor
        case 1 if read.level != 3:
            return "block", leaf
        case _:
            return "invalid", leaf


def _domain(state: str, context: StreamContext | None) -> Row:
    if context is None:
        return {
            "kind": state,
            "asid": None,
            "vmid": None,
            "ttb0": None,
            "ttb1": None,
            "s2ttb": None,
        }
    first, second = context.stage_1, context.stage_2
    kind = "nested" if first and second else "stage 1" if first else "stage 2"
    return {
        "kind": kind,
        "asid": first.asid if first else None,
        "vmid": context.tag.vmid,
        "ttb0": _base(first.low) if first else None,
        "ttb1": _base(first.high) if first else None,
        "s2ttb": second.address if second else None,
    }


def _base(base: TableBase) -> int | None:
    return base.address if base.enabled else None
