"""Puts the models of one machine on vfio-user sockets, and runs them all in the one event loop.

Each function has its own socket and its own view of guest RAM. Requests of the guest come first; between them the
scheduler lets one model do one small step, so that DMA is in flight while the guest goes on. The order of steps comes
from one seed.
"""

import logging
import math
import os
import select
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from viommu.closing import Closing
from viommu.control import ControlSocket, Methods
from viommu.endpoints.base import Endpoint
from viommu.endpoints.pasid import PasidService
from viommu.endpoints.port import DmaPort
from viommu.faults.calls import FunctionCalls, ServerCalls, SmmuCalls
from viommu.faults.control import FaultControl
from viommu.function import Function, SmmuFunction
from viommu.host import HostDomains
from viommu.host.methods import HostMethods
from viommu.memory import GuestMemory
from viommu.models import FunctionSpec, blamed, make_endpoint
from viommu.scheduler import DmaCalls, Scheduler
from viommu.smmu import Features, Smmu
from viommu.stack.calls import StackCalls
from viommu.stack.endpoint import EndpointDevice, EndpointDriver, driver_name
from viommu.stack.manager import IoManager
from viommu.trace import Event, Tracer
from viommu.views.caches import CacheViews
from viommu.views.functions import FunctionViews
from viommu.views.registers import RegisterViews
from viommu.views.tables import TableViews

_log = logging.getLogger(__name__)
_INVALIDATION_TIMEOUT = 60.0
# Seconds in which a function answers an ATS Invalidate Request (PCIe, 10.3.1: one minute).
_ALERT = (
    400e-6  # seconds after a request in which an idle loop looks for the next one before it sleeps
)
_IDLE = 200  # milliseconds after which an idle loop looks whether it shall stop


@dataclass(frozen=True, slots=True)
class ServerHolds(Event):
    """What the server keeps for its guest: TLB entries, cached structures, transactions, ranges of guest RAM."""

    tlb: int
    configuration: int
    in_flight: int
    memory_regions: int


class Server(Closing):
    """Serves the functions of one machine on sockets in `directory`, named after them.

    At most one function is the SMMU; every other reaches guest RAM through it. Raises what `vfio_user.PciDevice` does
    when a socket cannot be had, and what `make_endpoint` does.
    """

    def __init__(
        self,
        functions: Sequence[FunctionSpec],
        directory: Path,
        *,
        tracer: Tracer | None = None,
        features: Features | None = None,
        msix: bool = False,
        seed: int = 0,
        invalidation_timeout: float = _INVALIDATION_TIMEOUT,
        control: Path | None = None,
    ) -> None:
        """`invalidation_timeout`, in seconds, is how long the SMMU waits for a function's translation cache.

        With `control`, a control socket is served there.
        """
        self.tracer = tracer if tracer is not None else Tracer()
        self.sockets: dict[str, Path] = {}
        self.methods = Methods()
        """What can be called on the control socket."""
        self.io = IoManager(self.tracer)
        """The stacks: each endpoint is a device object of its model's driver."""
        StackCalls(self.io, self.methods)
        ServerCalls(self.methods, self._give_up)
        FunctionCalls(lambda: {each.name: each for each in self._functions}, self.methods)
        self._ports: dict[str, DmaPort] = {}
        self.faults = FaultControl(
            self.io, self._ports, self.tracer, self.methods, self._since_guest
        )
        """What goes wrong on purpose."""
        self._functions: list[Function] = []
        self.scheduler = Scheduler(self._functions, seed)
        """Who does the next step."""
        DmaCalls(self.scheduler, self.methods)
        FunctionViews(self._functions, time.monotonic, self.methods)
        self._host: HostDomains | None = None
        HostMethods(lambda: self.host).add_to(self.methods)
        self._open = ExitStack()
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._open.callback(os.close, self._woken)
        self._stopped = self._asked = False
        # On one CPU it would only keep the guest from running.
        self._alert = _ALERT if len(os.sched_getaffinity(0)) > 1 else 0.0
        self._alert_until = 0.0
        self._guest: float | None = None
        self._patience = invalidation_timeout
        self._awaited: tuple[object | None, float] = None, 0.0
        self._smmu: Smmu | None = None
        self._control: ControlSocket | None = None
        try:
            for spec in sorted(functions, key=lambda spec: spec.model != "smmuv3"):
                memory = GuestMemory()
                port: DmaPort | None = None
                model: Endpoint
                if spec.model == "smmuv3":
                    self._smmu = Smmu(memory, features, self.tracer)
                    SmmuCalls(self._smmu, self.methods)
                    for views in (RegisterViews, TableViews, CacheViews):
                        views(self._smmu, self.methods)
                    model = SmmuFunction(self._smmu)
                else:
                    port = DmaPort(memory, spec.stream_id, self._smmu, self.tracer)
                    self._ports[spec.name] = port
                    if control is not None:
                        port.keep_time(time.monotonic)
                    if self._smmu is not None and self._smmu.features.endpoint_pasid:
                        port.pasid = PasidService(self._smmu.features.substream_id_bits)
                    model = make_endpoint(
                        spec,
                        port,
                        order=self.scheduler.order,
                        tracer=self.tracer,
                        held=self._open,
                        wake=lambda: os.eventfd_write(self._woken, 1),
                    )
                path = directory / f"{spec.name}.sock"
                with blamed(spec):
                    function = Function(spec.name, model, memory, port, path, self.tracer, msix)
                self._open.callback(function.device.close)
                self._functions.append(function)
                self.sockets[spec.name] = path
                function.device.on_attach = self._guest_came
                if port is not None:
                    self._make_device(spec, function, port)
            if control is not None:
                self._control = ControlSocket(control, self.methods, tracer=self.tracer)
                self._open.callback(self._control.close)
            self._watch()
        except BaseException:
            self._open.close()
            raise

    @property
    def smmu(self) -> Smmu | None:
        """The SMMU of the machine, if it has one."""
        return self._smmu

    def run(self) -> None:
        """Serve until `stop` is called, from a signal handler or a model's callback."""
        while not self._stopped:
            self.turn(_IDLE)
            if self._asked:
                self._asked = False
                self._report()

    def turn(self, patience: int = 0) -> bool:
        """Take what the clients have sent, then let one model that had work before do one step. True when one did.

        When none had work, wait up to `patience` milliseconds for a client.
        """
        busy = self.scheduler.ready()
        changed = False
        called = False
        if (soon := self.faults.patience) is not None:
            patience = min(patience, math.ceil(soon * 1000))
        for descriptor, _ in self._ready(0 if busy else patience):
            function = self._polled.get(descriptor)
            if function is None:
                if descriptor == self._woken:
                    os.eventfd_read(descriptor)
                else:
                    called = True
                continue
            function.serve(patient=not busy)
            changed |= function.device.fileno() != descriptor
        if called and self._control is not None:
            self._control.serve()
        if changed:
            self._watch()
        if busy:
            self.scheduler.turn(busy)
        self.faults.turn()
        if self._host is not None:
            self._host.service()
        if self.io.pending:
            self.io.settle()
        if self._smmu is not None and len(self._smmu.ats_port) and not self.scheduler.paused:
            self._await_function(self._smmu)
        return bool(busy)

    def _ready(self, patience: int) -> list[tuple[int, int]]:
        """The descriptors that can be read. A guest that was just served is often back before a sleeper would wake."""
        ready = self._poller.poll(0)
        if patience and not ready:
            while not ready and time.monotonic() < self._alert_until:
                ready = self._poller.poll(0)
            ready = ready or self._poller.poll(patience)
        if ready:
            self._alert_until = time.monotonic() + self._alert
        return ready

    @property
    def host(self) -> HostDomains:
        """The domains of the host SMMU, which comes into being when it is asked for."""
        if self._host is None:
            self._host = HostDomains(self._ports, self.scheduler.work, self.tracer)
        return self._host

    def _await_function(self, smmu: Smmu) -> None:
        """The SMMU has no clock: tell it when a function took too long to answer."""
        oldest, now = smmu.ats_port.oldest, time.monotonic()
        if oldest is not self._awaited[0]:
            self._awaited = oldest, now
        elif now - self._awaited[1] > self._patience:
            self._give_up()

    def _give_up(self) -> int:
        """Let the time run out that functions have to answer ATS invalidations; returns how many had not."""
        self._awaited = None, 0.0
        count = self._smmu.give_up() if self._smmu is not None else 0
        _log.warning("%d ATS invalidations were not answered in time", count)
        return count

    def _guest_came(self) -> None:
        if sum(function.device.attached for function in self._functions) == 1:
            self._guest = time.monotonic()

    def _since_guest(self) -> float:
        """Seconds since a QEMU came; 0 while there is none."""
        return 0.0 if self._guest is None else time.monotonic() - self._guest

    def _make_device(self, spec: FunctionSpec, function: Function, port: DmaPort) -> None:
        def withdraw() -> None:
            if function in self._functions:
                function.device.close()
                self._functions.remove(function)
                del self.sockets[spec.name]
                self._watch()

        name = driver_name(spec.model)
        driver = self.io.drivers.get(name) or EndpointDriver(name)
        self.io.load_driver(driver)
        self.io.create_device(
            driver,
            EndpointDevice(
                spec.name,
                port,
                self.tracer,
                plugged=lambda: function.device.attached,
                withdraw=withdraw,
            ),
        )

    def _watch(self) -> None:
        self._poller = select.poll()
        self._polled = {function.device.fileno(): function for function in self._functions}
        for descriptor in (*self._polled, self._woken):
            self._poller.register(descriptor, select.POLLIN)
        if self._control is not None:
            self._poller.register(self._control, select.POLLIN)

    def _report(self) -> None:
        if self.tracer:
            smmu = self._smmu
            self.tracer.emit(
                ServerHolds(
                    tlb=len(smmu.tlb) if smmu else 0,
                    configuration=len(smmu.configuration) if smmu else 0,
                    in_flight=len(smmu.in_flight) if smmu else 0,
                    memory_regions=sum(len(f.memory.regions) for f in self._functions),
                )
            )

    def report(self) -> None:
        """Let `run` emit what the server holds; from a signal handler, for one."""
        self._asked = True

    def stop(self) -> None:
        """Let `run` return."""
        self._stopped = True

    def close(self) -> None:
        """End all connections and remove the sockets."""
        self._open.close()
