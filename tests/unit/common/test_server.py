"""One port: errors become statuses in one place, calls are counted, health and reflection."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prism.cluster.v1 import cluster_pb2, cluster_pb2_grpc
from prometheus_client import CollectorRegistry

from prism_common import caller, channels
from prism_common.addresses import Address
from prism_common.admission import Admission
from prism_common.calls import CallMetrics
from prism_common.errors import NoLeaderError, StartupError, WrongStateError
from prism_common.server import RpcServer
from prism_common.status import RemoteError, from_rpc_error, to_status

SERVICE = "prism.cluster.v1.ClusterService"
Context = grpc.aio.ServicerContext[Any, Any]


class Servicer(cluster_pb2_grpc.ClusterServiceServicer):
    """Fails as it is told."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        #: Of each call.
        self.clients: list[str] = []

    async def GetCluster(
        self, request: cluster_pb2.GetClusterRequest, context: Context
    ) -> cluster_pb2.Cluster:
        self.clients.append(caller.client.get())
        if self.error is not None:
            raise self.error
        return cluster_pb2.Cluster(id="c")

    async def Backup(
        self, request: cluster_pb2.BackupRequest, context: Context
    ) -> AsyncIterator[cluster_pb2.BackupResponse]:
        self.entered.set()
        try:
            yield cluster_pb2.BackupResponse(data=b"x")
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.left.set()

    async def ListPeers(
        self, request: cluster_pb2.ListPeersRequest, context: Context
    ) -> cluster_pb2.ListPeersResponse:
        await context.abort(grpc.StatusCode.DATA_LOSS, "aborted by hand")

    async def AddPeer(  # type: ignore[override]  # encoded already
        self, request: cluster_pb2.AddPeerRequest, context: Context
    ) -> bytes:
        return cluster_pb2.Peer(id="p").SerializeToString()


class Port:
    def __init__(self, server: RpcServer, servicer: Servicer, registry: CollectorRegistry) -> None:
        self.server = server
        self.servicer = servicer
        self.registry = registry
        self.channel = channels.open_channel(str(server.address))
        self.stub = cluster_pb2_grpc.ClusterServiceStub(self.channel)

    async def counted(self, method: str, code: str) -> None:
        """Wait until a call is counted, which comes after its caller has the answer."""
        async with asyncio.timeout(5):
            while self.count(method, code) != 1:  # noqa: ASYNC110 - a counter has no event
                await asyncio.sleep(0.001)

    def count(self, method: str, code: str) -> float:
        labels = {"grpc_service": SERVICE, "grpc_method": method, "grpc_code": code}
        return self.registry.get_sample_value("grpc_server_handled_total", labels) or 0.0

    async def failure(self, error: BaseException) -> RemoteError:
        self.servicer.error = error
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5)
        return from_rpc_error(caught.value)


@pytest.fixture
async def port() -> AsyncIterator[Port]:
    registry = CollectorRegistry()
    servicer = Servicer()  # type: ignore[abstract]  # the others answer UNIMPLEMENTED
    server = RpcServer(Address("127.0.0.1", 0), "--api", CallMetrics(registry))
    server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, servicer)
    server.bind()
    await server.start([SERVICE])
    made = Port(server, servicer, registry)
    yield made
    await made.channel.close()
    await server.stop(0)


async def test_a_good_call_is_counted(port: Port) -> None:
    answer = await port.stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5)
    assert answer.id == "c"
    await port.counted("GetCluster", "OK")
    labels = {"grpc_service": SERVICE, "grpc_method": "GetCluster"}
    assert port.registry.get_sample_value("grpc_server_handling_seconds_count", labels) == 1


async def test_an_answer_that_is_encoded_already_goes_out_as_it_is(port: Port) -> None:
    answer = await port.stub.AddPeer(cluster_pb2.AddPeerRequest(), timeout=5)
    assert answer == cluster_pb2.Peer(id="p")


async def test_what_serves_a_call_knows_whose_it_is(port: Port) -> None:
    request = cluster_pb2.GetClusterRequest()
    for metadata in ((), ((caller.ORIGIN, "ipv4:10.0.0.1:5"),), ((caller.ORIGIN, "x" * 500),)):
        await port.stub.GetCluster(request, timeout=5, metadata=metadata)
    own, forwarded, long = port.servicer.clients
    assert own.startswith("ipv4:127.0.0.1:")
    assert forwarded == "ipv4:10.0.0.1:5"
    assert long == "x" * 128
    assert caller.client.get() == ""  # nobody's outside of calls


async def test_an_expected_failure_keeps_its_details(port: Port) -> None:
    error = NoLeaderError("no leader", retry_after_s=0.5, metadata={"a": "b"})
    remote = await port.failure(error)
    assert (remote.code, remote.retry_after_s, remote.metadata) == ("NO_LEADER", 0.5, {"a": "b"})
    await port.counted("GetCluster", "UNAVAILABLE")


async def test_a_remote_failure_is_passed_on(port: Port) -> None:
    came = RemoteError(to_status(WrongStateError("there", reason="SANDBOX_PAUSED")))
    remote = await port.failure(came)
    assert (remote.code, remote.message) == ("SANDBOX_PAUSED", "there")


async def test_the_expected_failure_in_a_group_is_the_answer(port: Port) -> None:
    group = BaseExceptionGroup(
        "g", [ValueError("noise"), ExceptionGroup("g", [WrongStateError("inner")])]
    )
    remote = await port.failure(group)
    assert (remote.code, remote.message) == ("WRONG_STATE", "inner")


async def test_a_timeout_is_a_deadline(port: Port) -> None:
    assert (await port.failure(TimeoutError())).code == "DEADLINE_EXCEEDED"


async def test_an_unexpected_failure_is_logged_and_tells_no_secrets(
    port: Port, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        remote = await port.failure(ZeroDivisionError("secret"))
    assert remote.code == "INTERNAL"
    assert remote.status_code is grpc.StatusCode.INTERNAL
    assert "secret" not in remote.message
    assert "ZeroDivisionError" in remote.message
    assert [record.exc_info is not None for record in caplog.records] == [True]
    await port.counted("GetCluster", "INTERNAL")


async def test_an_abort_by_hand_is_counted_as_it_is(port: Port) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await port.stub.ListPeers(cluster_pb2.ListPeersRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    await port.counted("ListPeers", "DATA_LOSS")


async def test_a_stream_fails_with_details_after_what_it_has_sent(port: Port) -> None:
    port.servicer.error = WrongStateError("in the middle")
    call = port.stub.Backup(cluster_pb2.BackupRequest(), timeout=5)
    assert await call.read() == cluster_pb2.BackupResponse(data=b"x")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert from_rpc_error(caught.value).code == "WRONG_STATE"
    await port.counted("Backup", "FAILED_PRECONDITION")


async def test_a_cancelled_stream_lets_its_handler_go_at_once(port: Port) -> None:
    call = port.stub.Backup(cluster_pb2.BackupRequest())
    await port.servicer.entered.wait()
    await call.read()
    call.cancel()
    async with asyncio.timeout(5):
        await port.servicer.left.wait()
    await port.counted("Backup", "CANCELLED")


async def test_health_follows_set_serving_for_the_port_and_its_services(port: Port) -> None:
    stub: Any = health_pb2_grpc.HealthStub(port.channel)
    for serving in (False, True):
        await port.server.set_serving(serving)
        for name in ("", SERVICE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == (1 if serving else 2)


async def test_a_second_server_on_the_port_is_refused_by_its_flag(port: Port) -> None:
    second = RpcServer(port.server.address, "--raft", CallMetrics(CollectorRegistry()))
    with pytest.raises(StartupError, match="--raft"):
        second.bind()


async def test_a_message_that_is_too_long_is_refused_and_the_next_call_works(port: Port) -> None:
    long = cluster_pb2.GetClusterRequest()
    long.MergeFromString(b"\x7a" + b"\x80\x80\x80\x03" + bytes(6 * 2**20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await port.stub.GetCluster(long, timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await port.stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5)


async def test_the_pool_opens_one_channel_an_address() -> None:
    pool = channels.ChannelPool()
    assert pool.get("127.0.0.1:1") is pool.get("127.0.0.1:1")
    assert pool.get("127.0.0.1:1") is not pool.get("127.0.0.1:2")
    await pool.close()


async def test_a_client_with_too_much_under_way_is_refused_in_words() -> None:
    registry = CollectorRegistry()
    servicer = Servicer()  # type: ignore[abstract]  # the others answer UNIMPLEMENTED
    server = RpcServer(
        Address("127.0.0.1", 0),
        "--api",
        CallMetrics(registry),
        admission=Admission(calls_per_client_max=0),
    )
    server.add(cluster_pb2_grpc.add_ClusterServiceServicer_to_server, servicer)
    server.bind()
    await server.start([SERVICE])
    async with channels.open_channel(str(server.address)) as channel:
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetCluster(cluster_pb2.GetClusterRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        remote = from_rpc_error(caught.value)
        assert remote.code == "TOO_MANY_CALLS"
        assert remote.retry_after_s
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Backup(cluster_pb2.BackupRequest(), timeout=5):
                pass
        assert from_rpc_error(caught.value).code == "TOO_MANY_CALLS"
    await server.stop(0)
