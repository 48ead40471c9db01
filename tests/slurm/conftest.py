"""One cluster for all tests of this folder."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing, running_cluster
from tests.slurm.site import Site, make_site


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Six idle hosts. QVTUNE_REQUIRE_SLURM=1: where no cluster can be had the tests fail instead of being skipped."""
    if reason := missing():
        (pytest.fail if os.environ.get("QVTUNE_REQUIRE_SLURM") == "1" else pytest.skip)(f"no Slurm cluster: {reason}")
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A checkout, a model and data on the cluster."""
    return make_site(cluster, tmp_path_factory.mktemp("site"))
