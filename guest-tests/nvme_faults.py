"""What a plan can do to the DMA of an NVMe controller, and what its stock driver makes of it."""

from dataclasses import dataclass, replace

from nvme_rig import NvmeRig

KIB = 1 << 10


@dataclass(frozen=True)
class Place:
    """A kind of DMA: `when` finds it in a plan, while `size` bytes are written and then read, or written alone.

    If it is to a queue, then to that of the disk: the admin queues have entries of the same sizes, whenever the driver
    is made to let go of the pin.
    """

    name: str
    when: str
    direction: str = "read"
    size: int = 16 * KIB
    queue: str = ""


@dataclass(frozen=True)
class Seen:
    """What is seen of a fault.

    Whether the caller was told that all went well, and whether it did; the status of a command that failed; the states
    that the controller went through; what the kernel said.
    """

    done: bool = True
    right: bool = True
    status: str = ""
    states: tuple[str, ...] = ()
    log: str = ""


@dataclass(frozen=True)
class Fault:
    """`do` at the point `at` of a DMA."""

    place: Place
    at: str
    do: str
    seen: Seen
    on_aarch64: Seen | None = None
    """Where the SMMU or the pin makes a difference."""

    def __str__(self) -> str:
        words = "".join(each for each in self.do if each not in '{}"=,').split()
        return f"{self.place.name}-{self.at}-{'-'.join(words).removeprefix('action-')}"

    def plan(self, nvme: NvmeRig) -> str:
        when = self.place.when
        if self.place.queue:
            first, last = nvme.queue(self.place.queue)
            when += f", iova = [{first:#x}, {last:#x}]"
        return f"""
            [[fault]]
            at = "{self.at}"
            when = {{ stream_id = 0x100, times = 1, {when} }}
            do = {self.do}
        """

    def expected(self, machine: str) -> Seen:
        return self.on_aarch64 if machine == "aarch64" and self.on_aarch64 else self.seen


COMMAND = Place("command", "size = 64, write = false, nth = 2", queue="submission")
COMPLETION = Place("completion", "size = 16, write = true, nth = 2", queue="completion")
PRP_LIST = Place("list", "size = 248, write = false, nth = 2", size=128 * KIB)
DATA_IN = Place("data-in", f"size = [4096, {16 * KIB}], write = true")
DATA_OUT = Place("data-out", f"size = [4096, {16 * KIB}], write = false", "write")
PLACES = (COMMAND, COMPLETION, PRP_LIST, DATA_IN, DATA_OUT)

UNNOTICED = Seen()
RETRIED = Seen(status="DATA_TRANSFER_ERROR")
FATAL = Seen(states=("fatal", "disabled", "ready"), log="controller is down; will reset")
RESET = Seen(states=("disabled", "ready"), log="timeout, reset controller")
ABORTED = Seen(status="COMMAND_ABORT_REQUESTED", log="timeout, aborting")
POLLED = Seen(log="timeout, completion polled")
WRONG = Seen(right=False)
REFUSED = Seen(done=False, right=False, log="I/O Error")

_ABORTS = {
    COMMAND: FATAL,
    COMPLETION: FATAL,
    PRP_LIST: RETRIED,
    DATA_IN: RETRIED,
    DATA_OUT: RETRIED,
}
_HOLDS = {COMMAND: RESET, COMPLETION: RESET, PRP_LIST: ABORTED, DATA_IN: ABORTED, DATA_OUT: ABORTED}
_NOWHERE = '{ action = "replace", value = 0x5ead_0000_0000 }'
_LATE = '{ action = "hold", ms = 200 }'
_EIGHT_BYTES = '{ action = "truncate", size = 8 }'


def _toggle(*bits: int) -> str:
    return f'{{ action = "replace", toggle = {sum(1 << bit for bit in bits):#x} }}'


FAULTS = (
    # To the driver it is the same whether a DMA aborts, or waits, before its translation or after it.
    *(Fault(place, "dma-requested", _NOWHERE, _ABORTS[place]) for place in PLACES),
    *(Fault(place, "dma-translated", '"abort"', _ABORTS[place]) for place in PLACES),
    *(Fault(place, "dma-translated", '"hold"', _HOLDS[place]) for place in PLACES),
    *(Fault(place, "dma-completing", _LATE, UNNOTICED) for place in PLACES),
    # A command of zeros is a Flush of no namespace, with the identifier of another command.
    Fault(COMMAND, "dma-read", '"skip"', replace(RESET, status="INVALID_NAMESPACE_OR_FORMAT")),
    # It reads one block, to address 0.
    Fault(COMMAND, "dma-read", _EIGHT_BYTES, WRONG, on_aarch64=RETRIED),
    Fault(COMMAND, "dma-read", _toggle(7), replace(REFUSED, status="INVALID_OPCODE")),
    Fault(COMMAND, "dma-read", _toggle(31), RESET),  # another Command Identifier
    Fault(COMPLETION, "dma-writing", '"skip"', RESET),
    Fault(COMPLETION, "dma-writing", _EIGHT_BYTES, RESET),
    Fault(COMPLETION, "dma-writing", '"repeat"', UNNOTICED),
    # A message comes too early; the pin is asserted until all is read.
    Fault(
        COMPLETION,
        "dma-writing",
        '{ action = "defer", ms = 50 }',
        POLLED,
        on_aarch64=UNNOTICED,
    ),
    Fault(COMPLETION, "dma-writing", _toggle(111), RESET),  # another Command Identifier
    Fault(COMPLETION, "dma-writing", _toggle(115), UNNOTICED),  # Data Transfer Error: done again
    Fault(COMPLETION, "dma-writing", _toggle(115, 127), REFUSED),  # the same, and Do Not Retry
    Fault(PRP_LIST, "dma-read", '"skip"', WRONG, on_aarch64=RETRIED),  # address 0
    Fault(PRP_LIST, "dma-read", _EIGHT_BYTES, WRONG, on_aarch64=RETRIED),
    Fault(PRP_LIST, "dma-read", _toggle(0), replace(REFUSED, status="PRP_OFFSET_INVALID")),
    Fault(DATA_IN, "dma-writing", '"skip"', WRONG),
    Fault(DATA_IN, "dma-writing", _EIGHT_BYTES, WRONG),
    Fault(DATA_IN, "dma-writing", '"repeat"', UNNOTICED),
    Fault(DATA_IN, "dma-writing", _toggle(0), WRONG),
    # It lands when the command is over, and the next one begins.
    Fault(
        DATA_IN,
        "dma-writing",
        '{ action = "defer", until = { event = "NvmeCommandFetched", sq_id = 1 } }',
        WRONG,
    ),
    Fault(DATA_OUT, "dma-read", '"skip"', WRONG),
    Fault(DATA_OUT, "dma-read", _EIGHT_BYTES, WRONG),
    Fault(DATA_OUT, "dma-read", _toggle(0), WRONG),
)


def meet(nvme: NvmeRig, fault: Fault) -> Seen:
    """Let it happen once, to a guest that soon runs out of patience if that is what is expected."""
    control, log = nvme.rig.serving.control, fault.expected(nvme.machine).log
    with nvme.rig.serving.trace() as trace:
        trace.read()
        control.call("faults.load", plan=fault.plan(nvme))
        transfer = f"{fault.place.direction} {fault.place.size}"
        met, said = nvme.meet(transfer, patience=1 if log else 10)
        control.call("faults.clear")
        events = trace.read()
    assert met["again"], "what is done again is right"
    kinds = [event["kind"] for event in events]
    assert kinds.count("FaultInjected") == 1
    ended = [event["status"] for event in events if event["kind"] == "NvmeCommandEnded"]
    failed = [status for status in ended if status != "SUCCESS"]
    return Seen(
        done=met["done"],
        right=met["right"],
        status=" ".join(failed),
        states=tuple(event["state"] for event in events if event["kind"] == "NvmeStateChanged"),
        log=log if log in said and (log or "nvme" not in said) else said,
    )
