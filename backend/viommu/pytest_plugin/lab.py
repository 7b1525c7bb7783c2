"""The guests of one test: what they did that it must have foreseen, and what they leave as evidence."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from viommu.lab.guest import Guest
from viommu.lab.rig import Rig
from viommu.pytest_plugin.pool import Booted
from viommu.pytest_plugin.views import Account


@dataclass
class Watched:
    """A guest that the test has, and what has been told of it since it had it."""

    guest: Guest
    booted: Booted | None
    console_start: int
    server_start: int
    account: Account | None = None
    kernel_log: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)


class Lab:
    """What the fixture `viommu_lab` is: makes guests, and says what of their doings is foreseen.

    A WARNING, oops, panic or hang of a guest, the end of its server, a model that fails and an event of its SMMU fail
    the test, also one whose body has passed, unless the test says before that it may happen (`allow`) or must happen
    (`expect`).
    """

    def __init__(self, get: Callable[[dict[str, Any]], Booted], allowed: Sequence[str]) -> None:
        self._get = get
        self._allowed: list[re.Pattern[str]] = []
        self._watched: list[Watched] = []
        self._alarms: list[str] = []
        self.allow(*allowed)
        self._dirty = False

    def rig(self, **options: Any) -> Rig:
        """A machine with its guest up: the one that the options and the test's marker describe, but for `options`.

        Another test may have used it before. When it is one more than `--viommu-guests`, the one that was not asked
        for longest is ended, also one of this test. Raises `viommu.lab.errors.LabError` when it does not boot.
        """
        self._ask()  # one of ours may be ended for it
        booted = self._get(options)
        self._alarms += [f"since the last test: {alarm}" for alarm in booted.untold]
        booted.untold = ()
        if not any(each.booted is booted for each in self._watched):
            start = len(booted.rig.serving.output())
            guest = booted.rig.guest
            watched = Watched(guest, booted, len(guest.console_log()), start)
            if booted.ledger:
                watched.account = Account(booted.rig.serving.trace())
            self._watched.append(watched)
        return booted.rig

    def watch(self, guest: Guest) -> None:
        """Attach the console of a guest of the test's own to its report. What it does fails nothing."""
        self._watched.append(Watched(guest, None, len(guest.console_log()), 0))

    def allow(self, *patterns: str) -> None:
        """What may happen from now on, by regular expressions; as the marker `viommu_allow`."""
        self._allowed += [re.compile(pattern) for pattern in patterns]

    def soil(self) -> None:
        """Let no other test have the guests of this one; as the marker's `dirty`."""
        self._dirty = True

    @contextmanager
    def expect(self, *patterns: str) -> Iterator[list[str]]:
        """What must happen in the block: for each regular expression, something that it finds.

            with viommu_lab.expect("F_TRANSLATION"):
                viommu_guest.check("./dma-to-nowhere")

        The list is filled, at the end of the block, with all that matched, each line once.
        """
        found: list[str] = []
        self._ask()
        before, self._alarms = self._alarms, []
        try:
            yield found
        finally:
            self._ask()
            others: list[str] = []
            for alarm in self._alarms:
                matches = any(re.search(pattern, alarm) for pattern in patterns)
                (found if matches else others).append(alarm)
            self._alarms = before + others
        for pattern in patterns:
            if not any(re.search(pattern, alarm) for alarm in found):
                pytest.fail(f"expected of the guest, and did not happen: {pattern}")

    # For the plugin

    def unforeseen(self) -> list[str]:
        """What the guests did, so far, that the test has not foreseen."""
        self._ask()
        return [
            alarm
            for alarm in self._alarms
            if not any(pattern.search(alarm) for pattern in self._allowed)
        ]

    def leave(self) -> None:
        """The test is over."""
        for each in self._watched:
            if each.booted is not None and self._dirty:
                each.booted.dirty = True
            if each.account is not None:
                each.account.close()

    def sections(self) -> Iterator[tuple[str, str]]:
        """The evidence: titles and texts."""
        for name, each in self._named():
            yield f"{name}: console", each.guest.console_log()[each.console_start :]
            if each.booted is None or each.booted.closed:
                continue
            yield f"{name}: kernel log", "\n".join(each.kernel_log)
            yield f"{name}: SMMU events", "\n".join(each.events)
            if each.account is not None:
                yield f"{name}: ledger", each.account.text()
            yield f"{name}: server", each.booted.rig.serving.output()[each.server_start :]
            yield f"{name}: QEMU", shlex.join(each.guest.command_line)

    def traces(self) -> Iterator[tuple[str, Path]]:
        """The files that hold every event of the SMMUs, from the boot on."""
        for name, each in self._named():
            if each.booted is None or each.booted.closed:
                continue
            if (path := each.booted.rig.serving.trace_path) is not None:
                yield f"{name}: trace", path

    def _named(self) -> Iterator[tuple[str, Watched]]:
        """The guests, each with a name of its own."""
        seen = Counter[str]()
        for each in self._watched:
            arch = each.guest.machine.arch
            seen[arch] += 1
            yield f"{arch} guest" if seen[arch] == 1 else f"{arch} guest {seen[arch]}", each

    def _ask(self) -> None:
        for each in self._watched:
            if each.booted is None:
                continue
            news = each.booted.newsroom.ask()
            each.kernel_log += news.kernel_log
            each.events += news.events
            each.booted.dirty |= news.broken
            self._alarms += [alarm for alarm in news.alarms if alarm not in self._alarms]
