"""The injector on a real SMMU: which points are meant, how often, and that a seed repeats a run."""

from collections.abc import Mapping

import pytest

from tests.driver_rig import PAGE, STREAM
from tests.faults_rig import IOVA, Lab
from viommu.faults.injector import EffectCalled, Injector
from viommu.faults.plan import Plan
from viommu.smmu.events import CommandConsumed

ABORT = {"action": "abort", "code": "F_TRANSLATION"}


def aborted(when: dict[str, object], pages: int = 6, seed: int = 0) -> list[int]:
    lab = Lab({"at": "transaction-arrived", "when": when, "do": ABORT}, seed=seed)
    return [page for page in range(pages) if not lab.goes_through(page)]


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"stream_id": STREAM}, [0, 1, 2, 3, 4, 5]),
        ({"stream_id": STREAM + 1}, []),
        ({"stream_id": [STREAM, STREAM + 1]}, [0, 1, 2, 3, 4, 5]),
        ({"iova": [IOVA + PAGE, IOVA + 3 * PAGE]}, [1, 2, 3]),
        ({"write": True}, []),
        ({"size": 8}, [0, 1, 2, 3, 4, 5]),
        ({"nth": 3}, [2]),
        ({"nth": [2, 4]}, [1, 2, 3]),
        ({"every": 2}, [1, 3, 5]),
        ({"times": 2}, [0, 1]),
        ({"after": 1.0}, []),
        ({"before": 1.0}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_when(when: dict[str, object], expected: list[int]) -> None:
    assert aborted(when) == expected


def test_a_probability_comes_from_the_seed() -> None:
    runs = [aborted({"probability": 0.5}, 16, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert 0 < len(runs[0]) < 16


def test_since_and_until_are_events() -> None:
    lab = Lab(
        {
            "at": "transaction-arrived",
            "when": {
                "since": {"event": "CommandConsumed", "opcode": "CMD_CFGI_STE"},
                "until": {"event": "CommandConsumed", "opcode": "CMD_TLBI_NH_ASID"},
            },
            "do": ABORT,
        }
    )
    assert lab.goes_through(0)
    lab.rig.driver.invalidate_stream(STREAM)
    assert not lab.goes_through(0)
    lab.domain.flush()
    assert lab.goes_through(0)


def test_the_record_is_the_architectures() -> None:
    lab = Lab({"at": "transaction-arrived", "do": ABORT})
    assert not lab.goes_through(1, write=True)
    (record,) = lab.rig.driver.events()
    assert (record.event.name, record.address, record.rnw) == ("F_TRANSLATION", IOVA + PAGE, False)
    assert lab.injected == [1]


def test_a_held_sync_completes_late_and_in_time() -> None:
    lab = Lab({"at": "sync-completing", "do": {"action": "hold", "ms": 125}})
    waited = []

    def step() -> None:
        waited.append(lab.now)
        lab.now += 1 / 64
        lab.step()

    lab.rig.while_polling = step
    lab.domain.flush()
    assert len(waited) == 8
    assert lab.injector.patience is None


def test_a_hold_ends_in_time_when_another_guest_comes() -> None:
    lab = Lab()
    lab.injector.close()
    lab.now, seconds = 4.0, [1000.0]
    plan = Plan.of({"at": "sync-completing", "do": {"action": "hold", "ms": 125}})
    injector = Injector(plan, lab.rig.smmu.tracer, lambda: lab.now, timer=lambda: seconds[0])
    waited = []

    def step() -> None:
        waited.append(injector.patience)
        lab.now = 0.0
        seconds[0] += 1 / 64
        injector.turn()
        lab.rig.smmu.step()

    lab.rig.while_polling = step
    lab.domain.flush()
    assert len(waited) == 8
    assert waited[:2] == [0.125, 0.109375]


def test_a_skipped_invalidation_leaves_the_entry() -> None:
    lab = Lab({"at": "command-fetched", "when": {"opcode": "CMD_TLBI_NH_VA"}, "do": "skip"})
    assert lab.goes_through(0)
    lab.domain.unmap(IOVA, PAGE * 16)
    assert lab.goes_through(0)
    lab.injector.close()
    lab.domain.flush()
    assert not lab.goes_through(0)


def test_closing_lets_go_of_what_is_held() -> None:
    lab = Lab({"at": "command-fetched", "do": "hold"})

    def step() -> None:
        lab.injector.close()
        lab.step()

    lab.rig.while_polling = step
    lab.domain.flush()
    assert lab.rig.smmu.tracer.meddler is None


def test_effects_call_methods_on_events_and_at_times() -> None:
    lab = Lab()
    lab.injector.close()
    called: list[tuple[str, object]] = []

    def call(method: str, arguments: Mapping[str, object]) -> object:
        called.append((method, arguments))
        lab.rig.smmu.tracer.emit(CommandConsumed("CMD_TLBI_NH_ASID", 0, "", 0x11))  # calls nothing
        return "done"

    on = {"event": "CommandConsumed", "opcode": "CMD_TLBI_NH_ASID"}
    plan = Plan.of(
        effects=[
            {"on": on, "when": {"nth": 2}, "call": "a", "arguments": {"x": 1}},
            {"when": {"after": 5.0}, "call": "b"},
        ]
    )
    injector = Injector(plan, lab.rig.smmu.tracer, lambda: lab.now, call)
    lab.domain.flush()
    assert called == []
    assert injector.patience == 5.0
    lab.domain.flush()
    assert called == [("a", {"x": 1})]
    lab.now = 5.0
    injector.turn()
    injector.turn()
    assert called[1:] == [("b", {})]
    assert [str(event.outcome) for event in lab.events if isinstance(event, EffectCalled)] == [
        "done",
        "done",
    ]


@pytest.mark.parametrize(
    ("kind", "expected"), [("CommandConsumed", ["a", "b"]), ("EffectCalled", ["a"])]
)
def test_an_effect_causes_no_effects(kind: str, expected: list[str]) -> None:
    lab = Lab()
    lab.injector.close()
    called: list[str] = []
    asid = CommandConsumed("CMD_TLBI_NH_ASID", 0, "", 0x11)

    def call(method: str, _: Mapping[str, object]) -> None:
        called.append(method)
        assert len(called) < 5, "it goes round in circles"
        lab.rig.smmu.tracer.emit(asid)

    first = {"on": {"event": "CommandConsumed"}, "call": "a"}
    plan = Plan.of(effects=[first, {"on": {"event": kind}, "call": "b"}])
    Injector(plan, lab.rig.smmu.tracer, lambda: lab.now, call)
    lab.rig.smmu.tracer.emit(asid)
    assert called == expected
    lab.rig.smmu.tracer.emit(asid)
    assert called == 2 * expected
