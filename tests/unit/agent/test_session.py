"""The session: what cannot be kept on disk is not promised."""

import errno
from pathlib import Path
from typing import Any, cast

import pytest
from prism.agent.v1 import agent_pb2
from prism.node.v1 import node_pb2
from prometheus_client import CollectorRegistry

from prism_agent.data_directory import DataDirectory
from prism_agent.metrics import AgentMetrics
from prism_agent.reconcile import Reconciler
from prism_agent.reports import ReportQueue
from prism_agent.session import Session, SessionRefusedError


class _Sandboxes:
    """What a session asks before it obeys."""

    def __init__(self) -> None:
        self.reconciler = Reconciler(1)

    def renew_lease(self, until_s: float) -> None:
        """Nothing runs."""


def full(durable: bool) -> None:
    del durable
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_term_that_the_disk_does_not_take_is_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataDirectory(tmp_path)
    session = Session(
        ["127.0.0.1:9"],
        data,
        cast("Any", _Sandboxes()),
        ReportQueue(),
        lambda: (node_pb2.ResourceAmounts(), 0.0),
        AgentMetrics(CollectorRegistry()),
    )
    welcome = agent_pb2.Welcome(term=7, cluster_id="cluster")
    welcome.heartbeat_interval.FromSeconds(1)
    welcome.lease.FromSeconds(5)
    first = agent_pb2.SessionResponse(welcome=welcome)
    with monkeypatch.context() as disk:
        disk.setattr(data, "save", full)
        for _ in range(2):
            with pytest.raises(SessionRefusedError, match="No space left"):
                session._welcome(first, "127.0.0.1:9", 0.0)
            assert not session.connected_to
        # A leader that is obeyed already goes on being obeyed: only the lease is not kept.
        disk.setattr(data, "save", lambda durable: full(durable) if not durable else None)
        session._welcome(first, "127.0.0.1:9", 0.0)
    assert session.connected_to
    assert (data.state.term, data.state.cluster_id) == (7, "cluster")
    data.close()
