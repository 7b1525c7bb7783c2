"""What each action does at the points of ATS and PRI."""

from typing import Any

import pytest

from tests import smmu_rig as hw
from tests.ats_engine_rig import ERROR, HALTED, Engine
from tests.ats_engine_rig import IOVA as ATS_IOVA
from tests.ats_engine_rig import RAND48 as ATS_RAND48
from tests.ats_rig import ATS, AtsRig
from tests.faults_rig import shows
from tests.test_smmu_pri import PRI
from viommu.faults.injector import Injector
from viommu.faults.plan import Plan
from viommu.smmu import AtsStatus
from viommu.smmu.pri_queue import PageRequest, PageResponse, ResponseCode

IOVA = 0x1234_5000
ATC_INV, SYNC = (0x40 | hw.STREAM << 32, 52), (0x46, 0)


def faulty(rig: AtsRig, at: str, do: Any, **when: Any) -> Injector:
    return Injector(Plan.of({"at": at, "do": do, "when": when}), rig.smmu.tracer, lambda: 0.0)


def mapped() -> tuple[AtsRig, int]:
    rig = AtsRig(ATS)
    page = rig.alloc(4096)
    rig.map(IOVA, page | hw.PLAIN | hw.PAGE)
    return rig, page


@shows("ats-requested", "abort")
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("UR", AtsStatus.UNSUPPORTED_REQUEST),
        ("CA", AtsStatus.COMPLETER_ABORT),
        (None, AtsStatus.UNSUPPORTED_REQUEST),
    ],
)
def test_a_translation_request_that_fails(code: str | None, status: AtsStatus) -> None:
    rig, _ = mapped()
    faulty(rig, "ats-requested", {"action": "abort", "code": code})
    assert rig.ask(IOVA).status is status


@shows("ats-completing", "replace")
def test_a_wrong_completion() -> None:
    rig, page = mapped()
    faulty(rig, "ats-completing", {"action": "replace", "toggle": 0x1_0123}, iova=IOVA)
    assert rig.ask(IOVA).address == page ^ 0x1_0000


@shows("ats-completing", "hold")
@pytest.mark.parametrize("invalidated", [False, True])
def test_a_completion_that_is_late(invalidated: bool) -> None:
    engine = Engine()
    rig = engine.rig
    injector = faulty(rig, "ats-completing", {"action": "hold", "turns": 1}, iova=ATS_IOVA)
    engine.start(ATS_RAND48, 64)
    assert engine.drain() == ATS_RAND48, "it waits, and there is nothing to do"
    assert not engine.engine.busy
    assert len(engine.ats.cache) == 0
    if invalidated:
        engine.map(0, 0)
        rig.submit((0x30, 0), ATC_INV, SYNC)
    injector.close()
    # An answer of before the invalidation is not taken.
    assert engine.drain() == (ERROR if invalidated else HALTED)
    assert len(engine.ats.cache) == (0 if invalidated else 1)


@pytest.mark.parametrize(
    ("do", "told", "complete"),
    [
        pytest.param("skip", 0, True, marks=shows("atc-invalidating", "skip")),
        pytest.param("abort", 0, False, marks=shows("atc-invalidating", "abort")),
        pytest.param("repeat", 2, True, marks=shows("atc-invalidating", "repeat")),
        pytest.param(
            {"action": "defer", "turns": 1}, 0, False, marks=shows("atc-invalidating", "defer")
        ),
    ],
)
def test_an_invalidation_of_a_function(do: Any, told: int, complete: bool) -> None:
    rig, _ = mapped()
    injector = faulty(rig, "atc-invalidating", do)
    rig.submit(ATC_INV, SYNC)
    assert (len(rig.function.requests), rig.consumed) == (told, complete)
    injector.turn()
    late = do if isinstance(do, str) else do["action"]
    if late == "defer":
        assert (len(rig.function.requests), rig.consumed) == (1, True)
    elif late == "abort":
        rig.smmu.give_up()
        assert rig.read(hw.CMDQ_CONS) >> 24 == 3, "CERROR_ATC_INV_SYNC"


SUCCESS = PageResponse(5, ResponseCode.SUCCESS)


@pytest.mark.parametrize(
    ("do", "now", "later"),
    [
        pytest.param("skip", [], [], marks=shows("page-responding", "skip")),
        pytest.param(
            "repeat", [SUCCESS] * 2, [SUCCESS] * 2, marks=shows("page-responding", "repeat")
        ),
        pytest.param(
            {"action": "defer", "turns": 1}, [], [SUCCESS], marks=shows("page-responding", "defer")
        ),
        pytest.param(
            {"action": "replace", "value": 1},
            [SUCCESS._replace(code=ResponseCode.INVALID_REQUEST)],
            [SUCCESS._replace(code=ResponseCode.INVALID_REQUEST)],
            marks=shows("page-responding", "replace"),
        ),
    ],
)
def test_a_page_response(do: Any, now: list[PageResponse], later: list[PageResponse]) -> None:
    rig = AtsRig(PRI)
    injector = faulty(rig, "page-responding", do)
    rig.submit((0x41 | hw.STREAM << 32, 5 | 2 << 12))
    assert rig.function.responses == now
    injector.turn()
    assert rig.function.responses == later


@pytest.mark.parametrize(
    ("do", "records"),
    [
        pytest.param("skip", 0, marks=shows("record-written", "skip")),
        pytest.param({"action": "repeat", "times": 2}, 3, marks=shows("record-written", "repeat")),
        pytest.param("defer", 0, marks=shows("record-written", "defer")),
        pytest.param(
            {"action": "replace", "toggle": 1}, 1, marks=shows("record-written", "replace")
        ),
    ],
)
def test_a_page_request(do: Any, records: int) -> None:
    rig = AtsRig(PRI)
    queue = rig.alloc(4096)
    rig.write(hw.CR0, 0)
    rig.write64(0xC0, queue | 5)
    rig.write(hw.CR0, hw.SMMUEN | hw.EVENTQEN | hw.CMDQEN | 1 << 1)
    faulty(rig, "record-written", do, queue="pri")
    rig.smmu.page_request(PageRequest(hw.STREAM, None, IOVA, 5, last=True, read=True))
    assert rig.read(0x1_00C8) == records
    if do == {"action": "replace", "toggle": 1}:
        assert rig.get(queue) & 0xFFFF_FFFF == hw.STREAM ^ 1
