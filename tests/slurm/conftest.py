"""Tests on a real Slurm cluster. All of this folder are marked slurm and slow."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, why_not


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A new one for each test, which is up within half a second; what a test leaves there ends with it."""
    if reason := why_not():
        pytest.skip(reason)
    # not tmp_path, which is too long for the path of a socket
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()
