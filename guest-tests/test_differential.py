"""QEMU's own SMMUv3 judges ours: the same raw cases before both. Whoever judges can be wrong: that is tried too."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from viommu.differential import board
from viommu.differential.cases import Access, Case, Outcome, Verdict
from viommu.differential.circumstances import determined
from viommu.differential.compare import Court, compare
from viommu.differential.generate import generate
from viommu.differential.known import KNOWN, KNOWN_OF_QUEUE, KNOWN_OF_RECORDS, QEMU_ENDS
from viommu.differential.qemu_judge import QemuJudge
from viommu.differential.shrink import shrink
from viommu.lab.assets import Assets
from viommu.smmu import configuration, translation, walk
from viommu.smmu.configuration import Configuration
from viommu.smmu.tlb import Tlb

CASES = 300
SEED = 1


@pytest.fixture(scope="module")
def qemu() -> Iterator[QemuJudge]:
    with QemuJudge(Assets.load().qemu_for("aarch64").argv) as judge:
        yield judge


@pytest.fixture
def court(qemu: QemuJudge) -> Court:
    return Court(qemu)


def test_both_agree_but_for_what_is_explained(court: Court) -> None:
    result = court.run(SEED, CASES)
    assert result.cases == CASES
    assert not result.unexplained, "\n".join(
        f"case {number}: {finding}"
        for number, _, findings in result.unexplained
        for finding in findings
        if not finding.known
    )
    assert result.agreed > CASES / 3


@pytest.mark.parametrize("caching", ["none", "hostile"])
def test_whatever_is_cached_a_determined_case_comes_out_the_same(
    qemu: QemuJudge, caching: str
) -> None:
    normal, other = Court(qemu), Court(qemu, caching=caching)
    for number in range(CASES):
        case = generate(SEED, number, normal.abilities)
        assert other.model.judge(case) == normal.model.judge(case), f"case {number}"


def test_the_cases_reach_every_kind_of_outcome(court: Court) -> None:
    seen = set()
    for number in range(CASES):
        for outcome in court.model.judge(generate(SEED, number, court.abilities)).outcomes:
            seen.add(outcome.events[0] & 0xFF if outcome.events else outcome.reached is not None)
    # Through, in silence, and every event of stage 1 and of the configuration (IHI 0070, 7.3).
    assert seen >= {True, False, 2, 3, 4, 9, 10, 11, 16, 17, 18, 19}


def sabotage(place: object, name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Replace `name` in `place` by what `make` makes of it."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(place, name, make(getattr(place, name)))

    return apply


def nothing(original: Callable[..., Any]) -> Callable[..., None]:
    return lambda *arguments, **named: None


SABOTAGES: dict[str, tuple[Callable[[Any], None], ...]] = {
    "the access flag is not looked at": (sabotage(walk, "_AF", lambda _: 1),),
    "AP bits are swapped": (
        sabotage(walk, "_AP_USER", lambda _: 1 << 7),
        sabotage(walk, "_AP_READ_ONLY", lambda _: 1 << 6),
    ),
    "read-only tables are not": (sabotage(walk, "_AP_TABLE_READ_ONLY", lambda _: 0),),
    "an invalid descriptor is valid": (sabotage(walk, "_VALID", lambda _: 1 << 1),),
    "output addresses lose a bit": (sabotage(walk, "_ADDRESS", lambda mask: mask & ~(1 << 16)),),
    "faults have the wrong class": (
        sabotage(
            walk,
            "translation_fault",
            lambda fault: (
                lambda event, access, address, *_, **named: fault(
                    event, access, address, 1, **named
                )
            ),
        ),
    ),
    "cached refusals are recorded as reads": (
        sabotage(
            translation,
            "translation_fault",
            lambda fault: (
                lambda event, access, *rest, **named: fault(
                    event, access._replace(write=False), *rest, **named
                )
            ),
        ),
    ),
    "stage 2 confuses reading and writing": (
        sabotage(walk, "_S2AP_READ", lambda _: 1 << 7),
        sabotage(walk, "_S2AP_WRITE", lambda _: 1 << 6),
    ),
    "TLBI_S12_VMALL and NH_ALL do nothing": (sabotage(Tlb, "invalidate_vmid", nothing),),
    "a record of stage 2 has no IPA": (
        sabotage(
            walk,
            "translation_fault",
            lambda fault: lambda *rest, **named: fault(*rest, **{**named, "ipa": 0}),
        ),
    ),
    "the StreamID of a record is another": (
        sabotage(
            configuration,
            "configuration_fault",
            lambda fault: (
                lambda event, access, *rest: fault(
                    event, access._replace(stream_id=access.stream_id ^ 1), *rest
                )
            ),
        ),
    ),
    "CFGI_STE does nothing": (sabotage(Configuration, "invalidate_streams", nothing),),
    "TLBI_NH_VA does nothing": (sabotage(Tlb, "invalidate_address", nothing),),
    "TLBI_NH_ASID does nothing": (sabotage(Tlb, "invalidate_asid", nothing),),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_broken_model_is_found(
    name: str, qemu: QemuJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    for apply in SABOTAGES[name]:
        apply(monkeypatch)
    result = Court(qemu).run(SEED, CASES, stop_after=1)
    assert result.unexplained, f"{CASES} cases do not notice that {name}"


def test_a_difference_shrinks_to_what_it_needs(
    qemu: QemuJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "_AF", 1)
    court = Court(qemu)
    ((_, case, findings),) = court.run(SEED, CASES, stop_after=1).unexplained
    kind = next(finding.kind for finding in findings if not finding.known)
    assert kind == ("True []", "False [18]")  # ours goes through, QEMU says F_ACCESS
    smallest = shrink(case, court.differs(kind))
    assert len(smallest.accesses) == 1
    # An STE, two words of a CD, and at most four levels of tables; a 2-level stream table has one word more.
    assert len(smallest.image) <= 8
    assert court.differs(kind)(smallest)
    monkeypatch.undo()
    assert not Court(qemu).findings(smallest), "what is left has nothing to do with the access flag"


def test_each_known_difference_is_still_there(court: Court) -> None:
    """A rule that nothing needs would hide what it was not made for."""
    result = court.run(SEED, 3000)
    wanted = {known.name for known in KNOWN if known.applies_to(court.abilities)}
    assert {*wanted, *KNOWN_OF_QUEUE, *KNOWN_OF_RECORDS} <= set(result.explained)


def test_each_known_difference_has_its_reason() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs/differences.md").read_text("utf-8")
    headings = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    names = [known.name for known in KNOWN]
    assert sorted(headings) == sorted([*names, *KNOWN_OF_QUEUE, *KNOWN_OF_RECORDS, *QEMU_ENDS])


def test_the_comparison_sees_every_bit() -> None:
    case = Case(0, 0, steps=(Access(0x08, True, 0),))
    base = Verdict((Outcome(None, (0x10,)),), 3, 0)
    assert not compare(case, base, base)
    others = [
        *(Verdict((Outcome(None, (0x10 ^ 1 << bit,)),), 3, 0) for bit in range(256)),
        Verdict((Outcome(None),), 3, 0),
        Verdict((Outcome(0, (0x10,)),), 3, 0),
        Verdict((Outcome(None, (0x10, 0x10)),), 3, 0),
        Verdict(base.outcomes, 2, 0),
        Verdict(base.outcomes, 3, 1),
    ]
    for other in others:
        assert compare(case, base, other), other


def test_a_case_survives_being_printed(court: Court) -> None:
    for number in range(50):
        case = generate(SEED, number, court.abilities)
        assert Case.from_json(case.to_json()) == case
        assert generate(SEED, number, court.abilities) == case


def test_the_cases_are_determined(court: Court) -> None:
    assert all(determined(generate(SEED, number, court.abilities)) for number in range(CASES))


def test_shrinking_keeps_what_is_needed_only() -> None:
    chance = random.Random(4)
    image = {board.TABLES + 8 * place: chance.getrandbits(64) | 1 for place in range(40)}
    wanted = board.TABLES + 8 * 17
    steps = tuple(Access(0x08, True, 8 * place) for place in range(9))
    case = Case(board.TABLES, 11, 2, image, steps)

    def shows(candidate: Case) -> bool:
        return (
            bool(candidate.image.get(wanted, 0) & 1) and Access(0x08, True, 40) in candidate.steps
        )

    assert shrink(case, shows) == Case(0, 0, 0, {wanted: 1}, (Access(0x08, True, 40),))
