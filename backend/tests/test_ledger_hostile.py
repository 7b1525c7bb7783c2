"""A hostile guest with a witness beside it: whatever is in memory, looking at it neither fails nor changes a byte."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import smmu_rig as hw
from tests.hostile_rig import BASE, SIZE, Prey, addresses, everywhere, plain, quick, qwords
from tests.test_smmu_hostile_stages import CD, STREAM, TABLES, stage_2_words
from viommu.ledger import Ledger, Witness
from viommu.smmu import Features

COMMANDS = BASE + 0x8000


class Watched(Prey):
    """With a ledger that reads along. How often memory is read for it is not bounded by what the SMMU may read."""

    def __init__(self, features: Features) -> None:
        super().__init__(features)
        self.ledger = Ledger()
        self.ledger.follow(self.smmu.tracer)
        self.witness = Witness(self.smmu)
        self.prod = 0

    def check(self) -> None:
        pass

    def submit(self, *commands: tuple[int, int]) -> None:
        for command in commands:
            self.poke(COMMANDS + self.prod % 16 * 16, *command)
            self.prod = (self.prod + 1) % 32
        self.write(hw.CMDQ_PROD, 4, self.prod)
        self.step()


COMMAND = st.sampled_from(
    [
        (0x03 | STREAM << 32, 1),
        (0x05 | STREAM << 32, 1),
        (0x12 | hw.ASID << 48, BASE),
        (0x11 | hw.ASID << 48, 0),
        (0x30, 0),
        (0x28, 0),
        (0x46, 0),
    ]
)
WORDS = st.lists(st.tuples(st.integers(0, SIZE // 8 - 1), qwords), max_size=12)


@everywhere
@settings(quick, max_examples=200)
@given(
    stage_2_words(),
    st.sampled_from([hw.STE_S1, hw.STE_S2, hw.STE_NESTED]),
    WORDS,
    st.lists(st.tuples(WORDS, st.lists(COMMAND, max_size=3), addresses), max_size=4),
)
@example((0, 0), hw.STE_S1, [(0x4000 // 8 + n, TABLES | 3) for n in range(512)], [([], [], 0)])
def test_whatever_is_in_memory(
    features: Features,
    words: tuple[int, int],
    config: int,
    tables: list[tuple[int, int]],
    rounds: list[tuple[list[tuple[int, int]], list[tuple[int, int]], int]],
) -> None:
    prey = Watched(features)
    for index, word in tables:
        prey.poke(BASE + 8 * index, word)
    prey.poke(CD, hw.CD_PLAIN, TABLES, TABLES)
    prey.poke(BASE + 64 * STREAM, config | CD, 0, *words)
    plain(prey)
    for changes, commands, address in rounds:
        for flags in (0, 1):
            prey.dma(address, 0x2000, None, flags)
        for index, word in changes:
            prey.poke(BASE + 8 * index, word)
        prey.submit(*commands, (0x46, 0))
        before = bytes(prey.host)
        prey.witness.close()
        assert bytes(prey.host) == before
        prey.witness = Witness(prey.smmu)
        prey.dma(address, 0x100, None, 1)
    prey.finish()
    prey.ledger.verdict()
