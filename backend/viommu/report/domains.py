"""Reads which domain a stream is in: what memory says, if a witness tells, else what the SMMU has fetched."""

from viommu.layouts.commands import LAYOUTS, Command, Opcode, StreamCommand
from viommu.layouts.tables import ContextDescriptor, SteConfig, StreamTableEntry
from viommu.report.context import Context, Handler
from viommu.report.model import Item, Record

_SORT = "stays in domains"
_LANE = "Domain"


class Domains:
    """A stay is a span from attach to detach."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stays: dict[tuple[int, int | None], Item] = {}
        self._witnessed = False
        self._ended: Item | None = None
        self.handlers: dict[str, Handler] = {
            "StreamConfigured": self._configured,
            "StructureFetched": self._fetched,
        }

    # With a witness

    def _configured(self, record: Record) -> Item:
        self._witnessed = True
        return self._stay(record, *_state(record), substream_id=record["substream_id"])

    # By what the SMMU fetches

    def _fetched(self, record: Record) -> Item:
        context = self._context
        item = context.item(
            record, context.stream(record), "Tables", "tables",
            f"{record['structure']} at {record['address']:#x}", sort=record["structure"],
        )  # fmt: skip
        if self._witnessed:
            return item
        if record["structure"] == "STE":
            stay = self._stay(record, *_configuration(StreamTableEntry(_value(record))))
        else:
            known = self._stays.get((record["stream_id"], None))
            if known is None:
                return item
            stay = known
            if record["substream_id"] is None:
                stay = self._named(
                    record, known, f", ASID {ContextDescriptor(_value(record)).asid}"
                )
            stay.add(record)
        stay.relate(item)
        return item

    def _named(self, record: Record, stay: Item, name: str) -> Item:
        """The stay in the domain of that name: another one, if this one has another name by now."""
        config, comma, before = stay.title.partition(", ")
        if comma and comma + before != name:
            return self._stay(record, config + name, stay.tone)
        stay.title = config + name
        return stay

    def consumed(self, record: Record, command: Item) -> None:
        """A command may have ended a stay: what was fetched is forgotten, or what memory says is now in force."""
        if not record["opcode"].startswith("CMD_CFGI"):
            return
        value = _value(record)
        effect = LAYOUTS.get(Command(value).opcode, Command)(value)
        for key, stay in list(self._stays.items()):
            if _concerns(effect, key[0]):
                stay.relate(command)
                if not self._witnessed and "_CD" not in record["opcode"]:
                    self._context.close(self._stays.pop(key))

    # Both

    def _stay(self, record: Record, title: str, tone: str, substream_id: int | None = None) -> Item:
        context = self._context
        if substream_id is not None:
            title = f"substream {substream_id:#x}: {title}"
        key = record["stream_id"], substream_id
        before = self._stays.pop(key, None)
        item = context.open(
            record, context.stream(record), _LANE, "domain", title, sort=_SORT, tone=tone
        )
        if before is not None:
            context.close(before, record).relate(item)
        self._stays[key] = item
        return item

    def finish(self) -> None:
        """Every stay lasts to the end."""
        for item in self._stays.values():
            self._context.close(item)


def _value(record: Record) -> int:
    """What lay in memory: `text` begins with it."""
    return int(record["text"].partition(" ")[0], 16)


def _concerns(command: Command, stream_id: int) -> bool:
    if not isinstance(command, StreamCommand):
        return True
    if command.opcode is Opcode.CMD_CFGI_STE_RANGE:
        return not (command.stream_id ^ stream_id) >> (command.leaf_or_range + 1)
    return command.stream_id == stream_id


def _configuration(ste: StreamTableEntry) -> tuple[str, str]:
    """What to say of an STE, and how to take it."""
    if not ste.valid:
        return "invalid", "bad"
    tone = {SteConfig.ABORT: "warn", SteConfig.BYPASS: ""}.get(ste.config, "good")
    return getattr(ste.config, "name", hex(ste.config)).lower().replace("_", " "), tone


def _state(record: Record) -> tuple[str, str]:
    """What to say of a StreamConfigured, and how to take it."""
    state = record["state"]
    if state != "translate":
        return state, {"bypass": "", "abort": "warn"}.get(state, "bad")
    owner = [
        f"{name} {record[key]}"
        for name, key in (("ASID", "asid"), ("VMID", "vmid"))
        if record.get(key) is not None
    ]
    return ", ".join([record["config"].lower().replace("_", " "), *owner]), "good"
