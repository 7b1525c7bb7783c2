"""Transactions in flight, and what waits for them.

A transaction is in flight from its translation until its last byte moved. Some operations are complete only when
every transaction that may have used old state is done: a CMD_SYNC after an invalidation (3.21.3), the clearing of
SMMUEN (6.3.9.6), an update of GBPA (6.3.14).
"""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any


class InFlight:
    """The set of transactions in flight, with waiters for those that were in it at some moment."""

    def __init__(self) -> None:
        self.clock: Callable[[], float] | None = None
        """Set once by who wants to know since when something is in flight."""
        self._since: dict[int, float] = {}
        self._numbers = count(1)
        self._transactions: dict[int, Any] = {}
        self._waiters: list[tuple[set[int], Callable[[], None]]] = []

    def __len__(self) -> int:
        return len(self._transactions)

    def __iter__(self) -> Iterator[Any]:
        """The transactions, oldest first."""
        return iter(tuple(self._transactions.values()))

    @property
    def newest(self) -> Any:
        """The transaction that was translated last, of those in flight."""
        return next(reversed(self._transactions.values()))

    def next_number(self) -> int:
        """A number by which a transaction is known in the trace."""
        return next(self._numbers)

    def add(self, transaction: object) -> None:
        """`transaction` has been translated."""
        self._transactions[id(transaction)] = transaction
        if self.clock is not None:
            self._since[id(transaction)] = self.clock()

    def since(self, transaction: object) -> float | None:
        """When `transaction`, which is in flight, began, by the clock; None if there was none."""
        return self._since.get(id(transaction))

    def retire(self, transaction: object) -> None:
        """`transaction` is done; what only waited for it goes on. Retiring twice does nothing."""
        key = id(transaction)
        if self.clock is not None:
            self._since.pop(key, None)
        if self._transactions.pop(key, None) is None or not self._waiters:
            return
        ready = []
        for waiter in self._waiters:
            waiter[0].discard(key)
            if not waiter[0]:
                ready.append(waiter)
        self._waiters = [w for w in self._waiters if w[0]]
        for _, proceed in ready:
            proceed()

    def when_done(self, proceed: Callable[[], None]) -> int:
        """Call `proceed` once all transactions that are in flight now are done; at once when there are none.

        Returns how many it waits for.
        """
        if not self._transactions:
            proceed()
            return 0
        self._waiters.append((set(self._transactions), proceed))
        return len(self._transactions)

    def forget_waiters(self) -> None:
        """Drop everyone who waits: the SMMU was reset."""
        self._waiters.clear()
