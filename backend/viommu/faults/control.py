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
    """Carries out one plan at a time. While it has rules for DMA, a filter is in each endpoint's stack.

    It comes at the top. What is attached above it later stays there: then the filter leaves after that has gone.
    """

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
        self._filters: dict[str, FilterDevice] = {}
        self._late: list[tuple[str, Mapping[str, Any]]] = []
        self._loads = 0
        methods.add("faults.load", self.load_text)
        methods.add("faults.clear", self.clear)
        methods.add("faults.list", self.list)

    def load(self, plan: Plan) -> None:
        """Carry out `plan` from here on, in place of what was carried out before.

        Raises `PlanError`, and leaves that as it is, when an effect calls what cannot be called, or when there are
        rules for DMA and a filter can be attached above none of the endpoints.
        """
        for effect, line in zip(plan.effect, plan.effect_lines, strict=True):
            try:
                self._methods.check(effect.call, effect.arguments)
            except CallFailed as failed:
                raise PlanError(f"plan, line {line}: call: {failed.message}") from None
        if any(POINTS[rule.at] in DMA_POINTS for rule in plan.fault):
            self._attach_filters()
        else:
            self._remove_filters()
        self._close()
        self._injector = Injector(
            plan, self._tracer, self._clock, self._effect, timer=time.monotonic
        )

    def load_text(self, plan: str) -> list[dict[str, Any]]:
        """Carry out a plan, given as TOML, in place of the one before; returns its rules."""
        try:
            self.load(Plan.parse(plan))
        except PlanError as error:
            raise Refused(str(error)) from None
        return self.list()

    def clear(self) -> None:
        """Interfere no more; what is held goes on."""
        self._close()
        self._remove_filters()

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

    def _close(self) -> None:
        if self._injector is not None:
            self._injector.close()
            self._injector = None

    def _attach_filters(self) -> None:
        """Those of the plan before do for the next one too, as long as nobody has taken them away."""
        io = self._io
        self._filters = {
            name: each
            for name, each in self._filters.items()
            if each.attached_to is not None and not each.pending
        }
        driver = io.drivers.get(DRIVER) or DriverObject(DRIVER)
        io.load_driver(driver)
        self._loads += 1
        refusals = []
        for name, port in self._ports.items():
            if name in self._filters:
                continue
            # A filter of an earlier plan may still wait for its transactions.
            device = FilterDevice(f"faults{self._loads}.{name}", FaultFilter(port, self._tracer))
            status = io.create_device(driver, device)
            if status.success:
                status = io.attach_device(device, name)
                if status.success:
                    self._filters[name] = device
                else:  # the function is leaving, or something in its stack
                    io.delete_device(device)
            refusals.append(f"{name}: {status.name}")
        if refusals and not self._filters:
            raise PlanError(f"plan: there is no way to the DMA of {', '.join(refusals)}")

    def _remove_filters(self) -> None:
        for device in self._filters.values():
            if device.attached_to is not None and device.attached_device is None:
                self._io.detach_device(device.attached_to)
            self._io.remove_device(device)
        self._filters.clear()

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
