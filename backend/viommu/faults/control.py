"""The plan of a server: it is loaded and cleared while the guest runs, from the command line or the control socket."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from viommu.control import CallFailed, Methods, Refused
from viommu.endpoints.port import DmaPort
from viommu.faults.dma import DMA_POINTS, FaultFilter
from viommu.faults.injector import Injector
from viommu.faults.plan import Plan, PlanError
from viommu.faults.registry import POINTS
from viommu.stack import DriverObject, FilterDevice, IoManager
from viommu.trace import Tracer

DRIVER = "fault-injector"
AT_ONCE = ("smmu.", "function.")
"""The methods that an effect calls in the middle of what the guest does; others are called right after it."""


class FaultControl:
    """Carries out one plan at a time. While it has rules for DMA, a filter is at the top of each endpoint's stack."""

    def __init__(
        self,
        io: IoManager,
        ports: Mapping[str, DmaPort],
        tracer: Tracer,
        methods: Methods,
        clock: Callable[[], float],
    ) -> None:
        """`ports` are those of the endpoints, by name; `clock` gives seconds since the guest came."""
        self._io, self._ports, self._tracer = io, ports, tracer
        self._methods, self._clock = methods, clock
        self._injector: Injector | None = None
        self._filters: list[FilterDevice] = []
        self._late: list[tuple[str, Mapping[str, Any]]] = []
        self._loads = 0
        methods.add("faults.load", self.load_text)
        methods.add("faults.clear", self.clear)
        methods.add("faults.list", self.list)

    def load(self, plan: Plan) -> None:
        """Carry out `plan` from here on, in place of what was carried out before.

        Raises `PlanError`, and leaves that as it is, when an effect calls what cannot be called.
        """
        for effect, line in zip(plan.effect, plan.effect_lines, strict=True):
            try:
                self._methods.check(effect.call, effect.arguments)
            except CallFailed as failed:
                raise PlanError(f"plan, line {line}: call: {failed.message}") from None
        self.clear()
        self._loads += 1
        self._injector = Injector(
            plan, self._tracer, self._clock, self._effect, timer=time.monotonic
        )
        if any(POINTS[rule.at] in DMA_POINTS for rule in plan.fault):
            self._attach_filters()

    def load_text(self, plan: str) -> list[dict[str, Any]]:
        """Carry out a plan, given as TOML, in place of the one before; returns its rules."""
        try:
            self.load(Plan.parse(plan))
        except PlanError as error:
            raise Refused(str(error)) from None
        return self.list()

    def clear(self) -> None:
        """Interfere no more; what is held goes on."""
        if self._injector is not None:
            self._injector.close()
            self._injector = None
        for device in self._filters:
            if device.attached_to is not None:
                self._io.detach_device(device.attached_to)
            self._io.delete_device(device)
        self._filters.clear()

    def list(self) -> list[dict[str, Any]]:
        """List the rules and effects of the plan: where they are, what they do, how often they did."""
        if self._injector is None:
            return []
        rules = [
            {
                "line": each.line,
                "name": each.rule.name,
                "at": each.rule.at,
                "does": each.rule.do.action,
                "count": each.count.taken,
            }
            for each in self._injector.rules
        ]
        effects = [
            {
                "line": each.line,
                "name": each.effect.name,
                "at": "a time" if each.effect.on is None else each.effect.on.event,
                "does": each.effect.call,
                "count": each.count.taken,
            }
            for each in self._injector.effects
        ]
        return rules + effects

    def turn(self) -> None:
        """One turn of the event loop, between what clients do."""
        late, self._late = self._late, []
        for method, arguments in late:
            with self._tracer.causing():
                self._call(method, arguments)
        if self._injector is not None:
            self._injector.turn()

    @property
    def patience(self) -> float | None:
        """Seconds after which `turn` has something to do at the latest, if nothing happens."""
        if self._late:
            return 0.0
        return None if self._injector is None else self._injector.patience

    def _attach_filters(self) -> None:
        io = self._io
        driver = io.drivers.get(DRIVER) or DriverObject(DRIVER)
        io.load_driver(driver)
        for name, port in self._ports.items():
            # A filter of an earlier plan may still wait for its transactions.
            device = FilterDevice(f"faults{self._loads}.{name}", FaultFilter(port, self._tracer))
            if io.create_device(driver, device).success:
                if io.attach_device(device, name).success:
                    self._filters.append(device)
                else:  # the function is leaving
                    io.delete_device(device)

    def _effect(self, method: str, arguments: Mapping[str, Any]) -> object:
        if method.startswith(AT_ONCE):
            return self._call(method, arguments)
        self._late.append((method, arguments))
        return "called right after"

    def _call(self, method: str, arguments: Mapping[str, Any]) -> object:
        try:
            return self._methods.call(method, arguments)
        except CallFailed as failed:
            return failed.message
