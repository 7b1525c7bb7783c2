"""The status of each call in each state: what the model, a guest and docs/domains.md are held against."""

import re
from pathlib import Path

from viommu.driver.domains import NtStatus

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "domains.md"

# A device of four streams, 0 to 3, and a domain: attached is (0, 2). `alias` is a device that has the first stream too.
DEVICES = """
call               detached             attached                 attached elsewhere     detached again        blocked               deleted
attach(0, 2)       SUCCESS              DEVICE_ALREADY_ATTACHED  INVALID_DEVICE_STATE   SUCCESS               INVALID_DEVICE_STATE  INVALID_HANDLE
attach(1, 1)       SUCCESS              DEVICE_ALREADY_ATTACHED  INVALID_DEVICE_STATE   SUCCESS               INVALID_DEVICE_STATE  INVALID_HANDLE
attach(1, 2)       SUCCESS              DEVICE_ALREADY_ATTACHED  INVALID_DEVICE_STATE   SUCCESS               INVALID_DEVICE_STATE  INVALID_HANDLE
attach(2, 2)       SUCCESS              SUCCESS                  SUCCESS                SUCCESS               SUCCESS               INVALID_HANDLE
attach(4, 1)       INVALID_PARAMETER_3  INVALID_PARAMETER_3      INVALID_PARAMETER_3    INVALID_PARAMETER_3   INVALID_PARAMETER_3   INVALID_HANDLE
attach(2, 0)       INVALID_PARAMETER_4  INVALID_PARAMETER_4      INVALID_PARAMETER_4    INVALID_PARAMETER_4   INVALID_PARAMETER_4   INVALID_HANDLE
attach(2, 3)       INVALID_PARAMETER_4  INVALID_PARAMETER_4      INVALID_PARAMETER_4    INVALID_PARAMETER_4   INVALID_PARAMETER_4   INVALID_HANDLE
alias.attach(0, 1)  SUCCESS             SHARING_VIOLATION        SHARING_VIOLATION      SUCCESS               SHARING_VIOLATION     INVALID_HANDLE
detach(0)          INVALID_PARAMETER_2  SUCCESS                  INVALID_PARAMETER_MIX  ALREADY_DISCONNECTED  SUCCESS               INVALID_HANDLE
detach(1)          INVALID_PARAMETER_2  FREE_VM_NOT_AT_BASE      INVALID_PARAMETER_MIX  INVALID_PARAMETER_2   FREE_VM_NOT_AT_BASE   INVALID_HANDLE
detach(2)          INVALID_PARAMETER_2  INVALID_PARAMETER_3      INVALID_PARAMETER_2    INVALID_PARAMETER_2   INVALID_PARAMETER_3   INVALID_HANDLE
detach(4)          INVALID_PARAMETER_3  INVALID_PARAMETER_3      INVALID_PARAMETER_3    INVALID_PARAMETER_3   INVALID_PARAMETER_3   INVALID_HANDLE
report(0, on)      INVALID_PARAMETER_1  SUCCESS                  SUCCESS                INVALID_PARAMETER_1   SUCCESS               INVALID_PARAMETER_1
report(0, off)     INVALID_PARAMETER_1  SUCCESS                  SUCCESS                INVALID_PARAMETER_1   SUCCESS               INVALID_PARAMETER_1
report(0, nobody)  INVALID_PARAMETER_1  INVALID_PARAMETER_4      INVALID_PARAMETER_4    INVALID_PARAMETER_1   INVALID_PARAMETER_4   INVALID_PARAMETER_1
report(1, on)      INVALID_PARAMETER_1  FREE_VM_NOT_AT_BASE      FREE_VM_NOT_AT_BASE    INVALID_PARAMETER_1   FREE_VM_NOT_AT_BASE   INVALID_PARAMETER_1
report(2, on)      INVALID_PARAMETER_1  INVALID_PARAMETER_2      INVALID_PARAMETER_2    INVALID_PARAMETER_1   INVALID_PARAMETER_2   INVALID_PARAMETER_1
report(4, on)      INVALID_PARAMETER_2  INVALID_PARAMETER_2      INVALID_PARAMETER_2    INVALID_PARAMETER_2   INVALID_PARAMETER_2   INVALID_PARAMETER_2
flush              SUCCESS              SUCCESS                  SUCCESS                SUCCESS               SUCCESS               INVALID_HANDLE
delete             SUCCESS              RESOURCE_IN_USE          SUCCESS                SUCCESS               RESOURCE_IN_USE       INVALID_HANDLE
"""  # noqa: E501 - a table

# A domain of each type; a managed one maps a page and a block.
TYPES = """
call               translate            unmanaged            configured           pass-through
configure(root)    INVALID_PARAMETER_1  SUCCESS              SUCCESS              INVALID_PARAMETER_1
configure(odd)     INVALID_PARAMETER_1  INVALID_PARAMETER_2  INVALID_PARAMETER_2  INVALID_PARAMETER_1
configure(far)     INVALID_PARAMETER_1  INVALID_PARAMETER_2  INVALID_PARAMETER_2  INVALID_PARAMETER_1
configure(none)    INVALID_PARAMETER_1  INVALID_PARAMETER_2  INVALID_PARAMETER_2  INVALID_PARAMETER_1
configure(24 bits)  INVALID_PARAMETER_1  INVALID_PARAMETER_2  INVALID_PARAMETER_2  INVALID_PARAMETER_1
map(page)          SUCCESS              INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
map(pages)         SUCCESS              INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
map(odd memory)    INVALID_PARAMETER_3  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
map(no memory)     INVALID_PARAMETER_3  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
map(far memory)    INVALID_PARAMETER_3  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
map(odd address)   INVALID_PARAMETER_4  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
map(far address)   INVALID_PARAMETER_4  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
map(mapped)        CONFLICTING_ADDRESSES  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
unmap(page)        SUCCESS              INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
unmap(block)       SUCCESS              INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
unmap(half a block)  FREE_VM_NOT_AT_BASE  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
unmap(hole)        NOT_MAPPED_VIEW      INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
unmap(page, hole)  NOT_MAPPED_VIEW      INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
unmap(odd address)  INVALID_PARAMETER_2  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
unmap(no pages)    INVALID_PARAMETER_3  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
unmap(too many)    INVALID_PARAMETER_3  INVALID_PARAMETER_1  INVALID_PARAMETER_1  INVALID_PARAMETER_1
flush              SUCCESS              SUCCESS              SUCCESS              INVALID_PARAMETER_1
flush list         SUCCESS              SUCCESS              SUCCESS              INVALID_PARAMETER_1
flush odd list     INVALID_PARAMETER_3  INVALID_PARAMETER_3  INVALID_PARAMETER_3  INVALID_PARAMETER_1
attach             SUCCESS              SUCCESS              SUCCESS              SUCCESS
delete             SUCCESS              SUCCESS              SUCCESS              SUCCESS
"""


def table(text: str) -> dict[tuple[str, str], NtStatus]:
    """Rows are calls, columns are states; cells are apart by two blanks or more."""
    head, *rows = (re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines())
    assert all(len(row) == len(head) for row in rows)
    return {
        (call, state): NtStatus[cell]
        for call, *cells in rows
        for state, cell in zip(head[1:], cells, strict=True)
    }


def in_the_document(text: str) -> bool:
    """The same table stands in docs/domains.md."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines()]
    rows = [
        f"| `{line[0]}` | " + " | ".join(line[1:]) + " |" if number else f"| {' | '.join(line)} |"
        for number, line in enumerate(lines)
    ]
    document = DOCUMENT.read_text("utf-8")
    missing = [row for row in rows if row not in document]
    assert not missing, "\n".join(missing)
    return True
