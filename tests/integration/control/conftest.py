"""Clusters that several tests share: those that leave them as they were."""

from collections.abc import Iterator

import pytest

from tests.integration.harness import Cluster, cluster


@pytest.fixture(scope="package")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; tests only add to what it holds."""
    with cluster(tmp_path_factory.mktemp("three"), 3) as made:
        yield made
