"""The HTTP port for Prometheus and for liveness and readiness probes."""

import http.server
import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus

from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from prism_common.addresses import Address, check_port_free

logger = logging.getLogger(__name__)

#: `_created` series would double the number of series; Prometheus takes them for gauges of no unit.
disable_created_metrics()  # type: ignore[no-untyped-call]

#: Returns whether this process serves, and in words why not.
Readiness = Callable[[], tuple[bool, str]]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: Address, registry: CollectorRegistry, ready: Readiness) -> None:
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self.registry = registry
        self.ready = ready
        super().__init__((address.host, address.port), _Handler)

    def server_bind(self) -> None:
        """Bind, without HTTPServer's look-up of the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep a scraper that went away out of standard error."""
        logger.debug("a request of %s failed", client_address, exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    #: A scraper that stalls does not hold its thread for ever.
    timeout = 10

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._reply(HTTPStatus.OK, encode(self.server.registry), content_type)
        elif path == "/healthz":
            self._reply(HTTPStatus.OK, b"ok\n")
        elif path == "/readyz":
            ready, text = self.server.ready()
            status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
            self._reply(status, f"{text}\n".encode())
        else:
            self._reply(HTTPStatus.NOT_FOUND, b"try /metrics, /healthz or /readyz\n")

    do_HEAD = do_GET  # noqa: N815

    def _reply(
        self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep scrapes out of the log."""


class MetricsServer:
    """Serves /metrics, /healthz and /readyz from a thread of its own.

    A busy event loop does not delay a scrape, and a scrape does not delay the loop.
    """

    def __init__(
        self, address: Address, flag: str, registry: CollectorRegistry, ready: Readiness
    ) -> None:
        check_port_free(address, flag)
        self._server = _Server(address, registry, ready)
        self.address = Address(address.host, self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
