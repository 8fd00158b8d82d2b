"""Fixtures for tests on a real Slurm cluster. All tests of this folder are marked slurm and slow."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, why_not


@pytest.hookimpl(tryfirst=True)  # before -m selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A new cluster for each test. It starts within half a second, and everything on it ends with the test."""
    if reason := why_not():
        pytest.skip(reason)
    # tmp_path is too long for the path of a socket
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()
