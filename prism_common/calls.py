"""What every call of every service passes: admission, statuses from errors, and counting."""

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.message import Message
from prometheus_client import CollectorRegistry, Counter, Histogram

from prism_common import caller
from prism_common.admission import Admission
from prism_common.errors import DeadlineError, PrismError
from prism_common.status import DETAILS_KEY, code_named, status_of

logger = logging.getLogger(__name__)


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


class CallGuard:
    """Admits calls, turns PrismErrors into statuses with details, and counts every call.

    This is the one place that every call of every service passes: a caller's identity will be
    established here. It wraps handlers and is no interceptor of gRPC's, which would cost each call
    a coroutine and its lookup.
    """

    def __init__(self, metrics: CallMetrics, admission: Admission) -> None:
        self._metrics = metrics
        self._admission = admission

    def guarded(self, handlers: grpc.GenericRpcHandler) -> grpc.GenericRpcHandler:
        """Return a service's handlers with this guard before them."""
        return _Guarded(handlers, self._wrap)

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


class _Guarded(grpc.GenericRpcHandler):
    """The handlers of one service, each wrapped when it is first called."""

    def __init__(self, handlers: grpc.GenericRpcHandler, wrap: Callable[[Any, str], Any]) -> None:
        self._handlers = handlers
        self._wrap = wrap
        #: By method; only methods that are served are kept.
        self._wrapped: dict[str, Any] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a call, which goes on in this context; None: it has none."""
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = self._handlers.service(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = self._wrap(handler, method)
        # Until the handler knows its connection.
        caller.client.set(caller.origin_of(handler_call_details.invocation_metadata))
        return wrapped


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
