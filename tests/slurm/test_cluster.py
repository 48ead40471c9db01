"""The cluster that the other tests trust: its faults are what they say."""

from pathlib import Path

from tests.slurm.cluster import GPUS_PER_HOST, HOSTS, LOGIN, Cluster


def answers(cluster: Cluster, host: str) -> bool:
    return cluster.run(LOGIN, "ping", "-c1", "-W1", host, check=False).returncode == 0


def test_hosts_are_machines_of_their_own(cluster: Cluster) -> None:
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", f"--gpus-per-node={GPUS_PER_HOST}", "--label", "bash", "-c"]
    shown = cluster.run(LOGIN, *command, 'hostname; echo "$CUDA_VISIBLE_DEVICES"; ip -4 -brief address show eth0')
    lines = sorted(shown.stdout.splitlines())
    assert [line.split()[1] for line in lines if "n" in line.split()[1]] == ["n1", "n2"]
    assert sum(line.endswith("0,1,2,3,4,5,6,7") for line in lines) == 2
    assert [line.split()[3] for line in lines if "eth0" in line] == ["10.77.0.11/24", "10.77.0.12/24"]


def test_more_gpus_than_there_are_is_refused(cluster: Cluster) -> None:
    refused = cluster.run(LOGIN, "srun", f"--gpus-per-node={GPUS_PER_HOST + 1}", "true", check=False)
    assert refused.returncode != 0 and "Requested node configuration is not available" in refused.stderr


def test_a_job_can_be_followed_to_its_end(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--output=%j.out", "--wrap", 'echo "$SLURMD_NODENAME"; exit 3', cwd=tmp_path)
    done = cluster.wait(job, timeout=30)
    assert (done.state, done.code, done.restarts, done.hosts) == ("FAILED", 3, 0, ("n1",)), done.story
    assert done.log() == "n1\n"


def test_a_crashed_host_is_gone_and_comes_back(cluster: Cluster) -> None:
    host = HOSTS[-1]
    cluster.crash(host)
    assert not answers(cluster, host)
    cluster.boot(host)
    cluster.wait_idle(host)
    assert answers(cluster, host)


def test_a_cut_host_lives_on_unseen(cluster: Cluster) -> None:
    host = HOSTS[-1]
    cluster.cut(host)
    assert not answers(cluster, host)
    assert cluster.run(host, "hostname").stdout == f"{host}\n"
    cluster.heal(host)
    assert answers(cluster, host)


def test_a_daemon_can_be_killed_alone(cluster: Cluster) -> None:
    host = HOSTS[-1]
    assert cluster.pids(host, "slurmd")
    cluster.kill_slurmd(host)
    try:
        assert not cluster.pids(host, "slurmd") and answers(cluster, host)
    finally:
        cluster.start_slurmd(host)
    cluster.wait_idle(host)
