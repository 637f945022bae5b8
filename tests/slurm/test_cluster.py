"""The test cluster itself, where it can be less than two machines."""

import os
import shutil

import pytest

pytestmark = pytest.mark.slurm


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="as root, and: apt-get install util-linux")
def test_without_namespaces_two_daemons_share_the_host(new_cluster):
    with new_cluster("setpriv", "--bounding-set=-sys_admin,-net_admin") as cluster:
        assert not cluster.has_namespaces and cluster.address == "127.0.0.1"
        told = cluster.ask(
            "srun", "--nodes=2", "--gpus-per-node=8", "printenv", "SLURMD_NODENAME", "SLURM_GPUS_ON_NODE"
        )
        assert sorted(told.split()) == ["8", "8", "node1", "node2"]
