"""gRPC servers: bind plainly, map errors in one place, count calls, health and reflection."""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final, cast

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, Counter, Histogram

from prism_common import caller, limits
from prism_common.addresses import Address, check_port_free
from prism_common.admission import Admission
from prism_common.errors import DeadlineError, PrismError, StartupError
from prism_common.status import DETAILS_KEY, code_named, status_of

logger = logging.getLogger(__name__)

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


class CallMetrics:
    """grpc_server_handled_total and grpc_server_handling_seconds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.handled = Counter(
            "grpc_server_handled_total",
            "Calls that have ended, by status code.",
            ("grpc_service", "grpc_method", "grpc_code"),
            registry=registry,
        )
        #: Children by their labels: looking one up costs more than counting.
        self._children: dict[tuple[str, str, grpc.StatusCode], tuple[Counter, Histogram]] = {}
        self.handling = Histogram(
            "grpc_server_handling_seconds",
            "Time from the arrival of a call to its end.",
            ("grpc_service", "grpc_method"),
            registry=registry,
        )

    def count(self, service: str, method: str, code: grpc.StatusCode, seconds: float) -> None:
        """Count a call that has ended."""
        key = (service, method, code)
        children = self._children.get(key)
        if children is None:
            children = self._children[key] = (
                self.handled.labels(service, method, code.name),
                self.handling.labels(service, method),
            )
        children[0].inc()
        children[1].observe(seconds)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Admits calls, turns PrismErrors into statuses with details, and counts every call.

    This is the one place that every call of every service passes: a caller's identity will be
    established here.
    """

    def __init__(self, metrics: CallMetrics, admission: Admission) -> None:
        self._metrics = metrics
        self._admission = admission
        #: Wrapped handlers by method; only methods that are served are kept.
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of the called method."""
        # Until the handler knows its connection; the call's own task goes on from here.
        caller.client.set(caller.origin_of(handler_call_details.invocation_metadata))
        wrapped = self._handlers.get(handler_call_details.method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._handlers[handler_call_details.method] = self._wrap(
                handler, handler_call_details.method
            )
        return wrapped

    def _wrap(self, handler: Any, path: str) -> Any:
        service, _, method = path.lstrip("/").partition("/")
        kind = (handler.request_streaming, handler.response_streaming)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[kind]
        behaviour = {
            (False, False): handler.unary_unary,
            (True, False): handler.stream_unary,
            (False, True): handler.unary_stream,
            (True, True): handler.stream_stream,
        }[kind]
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        return make(
            wrap(behaviour, service, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=_serializer_of(handler),
        )

    def _wrap_unary(
        self, behaviour: Callable[..., Awaitable[Any]], service: str, method: str
    ) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            started = time.perf_counter()
            code = grpc.StatusCode.OK
            # A stream of requests has no size yet; each of its messages is bounded.
            size = request.ByteSize() if isinstance(request, Message) else 0
            client, admitted = _client_of(context), False
            try:
                self._admission.enter(client, size)
                admitted = True
                return await behaviour(request, context)
            except BaseException as error:
                code = _code_of_failure(error, context)
                await _abort(error, context, f"{service}/{method}")
                raise
            finally:
                if admitted:
                    self._admission.leave(client, size)
                self._count(service, method, code, started)

        return call

    def _wrap_stream(
        self, behaviour: Callable[..., AsyncIterator[Any]], service: str, method: str
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            started = time.perf_counter()
            code = grpc.StatusCode.OK
            client, admitted = _client_of(context), False
            try:
                self._admission.enter(client, 0)
                admitted = True
                result = behaviour(request, context)
                if inspect.isawaitable(result):
                    # A handler that writes by itself, such as the health service's Watch.
                    await result
                else:
                    # Whatever the handler holds is let go with the call, and not some time later.
                    async with contextlib.aclosing(cast("Any", result)) as responses:
                        async for response in responses:
                            yield response
            except BaseException as error:
                code = _code_of_failure(error, context)
                await _abort(error, context, f"{service}/{method}")
                raise
            finally:
                if admitted:
                    self._admission.leave(client, 0)
                self._count(service, method, code, started)

        return call

    def _count(self, service: str, method: str, code: grpc.StatusCode, started: float) -> None:
        self._metrics.count(service, method, code, time.perf_counter() - started)


def _serializer_of(handler: Any) -> Callable[[Any], bytes] | None:
    """Return a handler's serializer, past which goes what the handler has encoded by itself."""
    serialize = handler.response_serializer
    if serialize is None:
        return None

    def encoded(response: Any) -> bytes:
        return response if type(response) is bytes else cast("bytes", serialize(response))

    return encoded


def _client_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Return whose call it is, and let all that serves it know."""
    client = caller.client.get() or context.peer()
    caller.client.set(client)
    return client


def _as_prism_error(error: BaseException) -> PrismError | None:
    if isinstance(error, PrismError):
        return error
    if isinstance(error, BaseExceptionGroup):
        # A TaskGroup wraps what its tasks raise; the first expected failure is the answer.
        for inner in error.exceptions:
            found = _as_prism_error(inner)
            if found is not None:
                return found
    if isinstance(error, TimeoutError):
        return DeadlineError("the call's deadline passed before its answer was there")
    return None


def _code_of_failure(
    error: BaseException, context: grpc.aio.ServicerContext[Any, Any]
) -> grpc.StatusCode:
    expected = _as_prism_error(error)
    if expected is not None:
        return code_named(status_of(expected).code)
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED
    if isinstance(error, grpc.aio.AbortError):
        # The stubs say StatusCode; grpc.aio keeps the number.
        code: Any = context.code()
        return code if isinstance(code, grpc.StatusCode) else code_named(int(code or 2))
    return grpc.StatusCode.INTERNAL


async def _abort(
    error: BaseException, context: grpc.aio.ServicerContext[Any, Any], method: str
) -> None:
    if isinstance(error, asyncio.CancelledError | GeneratorExit | grpc.aio.AbortError):
        return
    expected = _as_prism_error(error)
    if expected is None:
        logger.error("unexpected failure in %s", method, exc_info=error)
        expected = PrismError(
            f"unexpected failure in {method}: {type(error).__name__}; see the log"
        )
    status = status_of(expected)
    await context.abort(
        code_named(status.code),
        status.message,
        ((DETAILS_KEY, status.SerializeToString()),),
    )


def _serves_a_call(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__name__", "") == "_schedule_rpc_coro"


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
        self.server = grpc.aio.server(
            interceptors=[CallInterceptor(metrics, admission or Admission())],
            options=(
                *SERVER_OPTIONS,
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.max_send_message_length", message_bytes_max),
            ),
        )
        self._health = HealthServicer()
        self._names: list[str] = []

    def add(self, register: Callable[[Any, grpc.aio.Server], None], servicer: object) -> None:
        """Serve a servicer by its generated add_…Servicer_to_server function."""
        register(servicer, self.server)

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
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection(
            [
                *self._names,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ],
            self.server,
        )
        await self.server.start()

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
        # gRPC's own tasks outlast its stop by a moment; if the end of the loop cancels them, each
        # prints a traceback.
        left = [task for task in asyncio.all_tasks() if _serves_a_call(task)]
        if left:
            await asyncio.wait(left, timeout=_LEFT_TASKS_S)
