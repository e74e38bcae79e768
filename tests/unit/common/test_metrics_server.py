import http.client
import socket
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.parser import text_string_to_metric_families

from prism_common.addresses import Address
from prism_common.errors import StartupError
from prism_common.metrics_server import MetricsServer

READY = [(True, "n1 leads in term 3")]


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    Counter("demo_total", "Demo.", registry=registry).inc(3)
    Histogram("demo_seconds", "Demo.", registry=registry).observe(1)
    made = MetricsServer(Address("127.0.0.1", 0), "--metrics", registry, lambda: READY[-1])
    made.start()
    yield made
    made.stop()


def _get(server: MetricsServer, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.address.port, timeout=5)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_it_serves_metrics_health_and_readiness(server: MetricsServer) -> None:
    assert _get(server, "/healthz") == (200, "ok\n")
    assert _get(server, "/readyz?verbose") == (200, "n1 leads in term 3\n")
    assert _get(server, "/nothing")[0] == 404
    assert _get(server, "/metrics", "HEAD") == (200, "")
    assert _get(server, "/metrics", "POST")[0] == 501
    READY.append((False, "no leader: start the others"))
    try:
        assert _get(server, "/readyz") == (503, "no leader: start the others\n")
    finally:
        READY.pop()


def test_there_are_no_created_series(server: MetricsServer) -> None:
    status, text = _get(server, "/metrics")
    assert status == 200
    assert {f.name for f in text_string_to_metric_families(text)} == {"demo", "demo_seconds"}
    assert "_created" not in text


def test_a_scraper_that_goes_away_is_not_heard_of(
    server: MetricsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for request in (b"GET /metrics HTTP/1.1\r\n\r\n", b"nonsense\r\n\r\n", b"\0"):
        with socket.create_connection(("127.0.0.1", server.address.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(request)
    assert _get(server, "/healthz")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_port_in_use_names_the_flag(server: MetricsServer) -> None:
    with pytest.raises(StartupError, match="--metrics"):
        MetricsServer(server.address, "--metrics", CollectorRegistry(), lambda: READY[-1])


def test_it_can_be_stopped_before_it_was_started() -> None:
    made = MetricsServer(Address("::1", 0), "--metrics", CollectorRegistry(), lambda: READY[-1])
    made.stop()
