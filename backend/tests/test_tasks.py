"""Generators that take turns."""

from viommu.endpoints.tasks import Tasks
from viommu.endpoints.transfers import Steps


class Gate:
    """What a generator waits for."""

    waiting = True


class Log:
    """Who did a step."""

    def __init__(self, width: int | None = None) -> None:
        self.tasks = Tasks() if width is None else Tasks(width)
        self.said = ""

    def work(self, name: str, steps: int) -> Steps:
        for _ in range(steps):
            self.said += name
            yield None
        self.said += name.upper()

    def run(self) -> str:
        while self.tasks.busy:
            self.tasks.step()
        return self.said


def test_they_take_turns_and_one_that_ends_lets_the_next_go_on() -> None:
    log = Log()
    log.tasks.spawn(log.work("a", 1))
    log.tasks.spawn(log.work("b", 2))
    log.tasks.step()
    log.tasks.step()
    assert log.said == "ab"
    log.tasks.step()
    assert log.said == "abAb", "in one step"
    assert log.run() == "abAbB"
    assert len(log.tasks) == 0


def test_at_most_two_end_in_one_step() -> None:
    log = Log()
    for name in "abc":
        log.tasks.spawn(log.work(name, 0))
    log.tasks.step()
    assert log.said == "AB"


def test_only_the_oldest_take_turns() -> None:
    log = Log(width=2)
    for name in "abc":
        log.tasks.spawn(log.work(name, 2))
    assert log.run() == "ababABccC"


def test_what_is_early_joins_those_that_take_turns() -> None:
    log = Log(width=2)
    for name in "abc":
        log.tasks.spawn(log.work(name, 1))
    log.tasks.spawn(log.work("x", 1), early=True)
    assert log.run() == "axAXbcBC"


def test_what_is_urgent_comes_first() -> None:
    log = Log(width=1)
    for name in "ab":
        log.tasks.spawn(log.work(name, 1))
    log.tasks.step()
    for name in "xy":
        log.tasks.spawn(log.work(name, 1), urgent=True)
    assert log.run() == "axXyYAbB"


def test_those_that_wait_are_passed_over() -> None:
    log, gate = Log(width=1), Gate()

    def waits() -> Steps:
        while gate.waiting:
            yield gate
        log.said += "w"

    log.tasks.spawn(waits(), urgent=True)
    log.tasks.spawn(log.work("a", 1))
    assert log.run() == "aA"
    assert len(log.tasks) == 1
    gate.waiting = False
    assert log.run() == "aAw"


def test_one_that_is_cancelled_ends_where_it_is() -> None:
    log = Log()
    task = log.tasks.spawn(log.work("a", 3), urgent=True)
    log.tasks.spawn(log.work("b", 1))
    log.tasks.step()
    log.tasks.cancel(task)
    assert log.run() == "abB"
