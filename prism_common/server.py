"""gRPC servers: bind plainly, guard all calls, accept many at once, health and reflection."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from prism_common import limits
from prism_common.acceptors import Acceptors, serves_a_call
from prism_common.addresses import Address, check_port_free
from prism_common.admission import Admission
from prism_common.calls import CallGuard, CallMetrics
from prism_common.errors import StartupError

SERVER_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    # Without this a second process on the port would silently share it.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.max_frame_size", limits.FRAME_BYTES_MAX),
    ("grpc.keepalive_time_ms", limits.KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Our clients ping every KEEPALIVE_S; more often than half of that is refused.
    ("grpc.http2.min_ping_interval_without_data_ms", limits.KEEPALIVE_S * 500),
    ("grpc.http2.max_ping_strikes", 0),
)


#: For gRPC to finish with calls that have ended.
_LEFT_TASKS_S: Final = 1.0


class RpcServer:
    """One gRPC port with its services, health and reflection.

    Args:
        address: Where to listen; port 0 asks the system for one.
        flag: The flag that gave the address, for error messages.
        metrics: Counts the calls.
        message_bytes_max: Of one message, either way.
        admission: What clients may have under way.
    """

    def __init__(
        self,
        address: Address,
        flag: str,
        metrics: CallMetrics,
        message_bytes_max: int = limits.MESSAGE_BYTES_MAX,
        admission: Admission | None = None,
    ) -> None:
        self.address = address
        self._flag = flag
        self._guard = CallGuard(metrics, admission or Admission())
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._acceptors: Acceptors | None = None
        self.server = grpc.aio.server(
            options=(
                *SERVER_OPTIONS,
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.max_send_message_length", message_bytes_max),
            ),
        )
        self._health = HealthServicer()
        self._names: list[str] = []

    def add(self, register: Callable[[Any, Any], None], servicer: object) -> None:
        """Serve a servicer by its generated add_…Servicer_to_server function."""
        register(servicer, self)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Take the handlers of a service: generated code calls this."""
        guarded = [self._guard.guarded(each) for each in handlers]
        self._handlers += guarded
        self.server.add_generic_rpc_handlers(guarded)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Do nothing: generated code calls this too, and grpc.aio has no use for it."""

    def bind(self) -> Address:
        """Take the port; return the address with the real one.

        Raises:
            StartupError: The address cannot be bound; the line names the flag.
        """
        check_port_free(self.address, self._flag)
        try:
            port = self.server.add_insecure_port(str(self.address))
        except RuntimeError:
            port = 0
        if not port:
            raise StartupError(f"{self._flag}: cannot listen on {self.address}: address in use")
        self.address = Address(self.address.host, port)
        return self.address

    async def start(self, names: Iterable[str]) -> None:
        """Answer calls on the bound port. `names` are the full names of the services added."""
        self._names = list(names)
        self.add(health_pb2_grpc.add_HealthServicer_to_server, self._health)
        served = [
            *self._names,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ]
        self.add(
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server,
            ReflectionServicer(service_names=served),
        )
        await self.server.start()
        self._acceptors = Acceptors(self.server, self._handlers)

    async def set_serving(self, serving: bool) -> None:
        """Tell the health service, for the port as a whole ("") and for each service."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._names):
            await self._health.set(name, cast("Any", status))

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give those under way `grace_s`, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)
        if self._acceptors is not None:
            await self._acceptors.ended()
        # gRPC's own tasks outlast its stop by a moment; if the end of the loop cancels them, each
        # prints a traceback.
        left = [task for task in asyncio.all_tasks() if serves_a_call(task)]
        if left:
            await asyncio.wait(left, timeout=_LEFT_TASKS_S)
