"""A real Slurm cluster on one machine: munged, slurmctld and six slurmd, each host in namespaces of its own.

A host has its own network, host name, mounts and process numbers, so that it can crash, lose its network or its daemon
like a machine; its GPUs are device files that nobody opens. Everything hangs on this process: its files lie in one
private folder, nothing of the machine's own network or configuration is touched, and the kernel ends every process of
the cluster when this one ends, however that happens. Several clusters can live side by side.

`python -m tests.slurm.cluster [COMMAND ...]` brings one up and runs a command, else a shell, on its login host.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

LOGIN = "ctl"  # slurmctld runs here; jobs are submitted here
HOSTS = tuple(f"n{number}" for number in range(1, 7))
GPUS_PER_HOST = 8
SLURMD_TIMEOUT_SECONDS = 10
POLL_SECONDS = 0.5  # each look at a job starts two processes
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv", "pgrep")

_CONFIG = Path(__file__).parent / "slurm.conf.in"
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_UNFINISHED = {
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "SIGNALING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD"),
}
# Process 1 of a host: it only waits and reaps. Whoever kills it kills every process of the host.
_INIT = """
hostname "$1" && mount -t proc proc /proc && mount -t sysfs sysfs /sys && mount -t tmpfs tmpfs /dev/shm &&
mount --bind "$2" /etc/hosts && ip link set lo up && echo ready || exit 1
exec >/dev/null
trap '' TERM INT HUP
while :; do sleep 60 & wait; done
"""


@dataclass(frozen=True)
class Job:
    """What slurmctld knows of a job (``scontrol show job``)."""

    id: str
    state: str
    reason: str
    code: int
    signal: int
    restarts: int
    hosts: tuple[str, ...]  # of its last start; empty before the first
    output: Path

    @property
    def finished(self) -> bool:
        """Whether it has ended and will not start again by itself."""
        return self.state not in _UNFINISHED

    def log(self) -> str:
        """The job's output so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    @property
    def story(self) -> str:
        """For the message of a failed assertion."""
        return f"{self}\n--- {self.output}\n{self.log()[-8000:]}"


def missing() -> str | None:
    """What this machine lacks for a cluster; None when it has everything."""
    tools = [tool for tool in TOOLS if shutil.which(tool, path=_SEARCH_PATH) is None]
    if tools:
        return f"no {', '.join(tools)}: apt-get install slurm-wlm munge iproute2 procps"
    if os.geteuid() != 0:
        return "namespaces, and device files for GPUs, need root"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


def wait_until(condition: Callable[[], object], what: str, timeout: float) -> None:
    """Look every POLL_SECONDS; TimeoutError that says ``what`` did not come about in ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {what}")
        time.sleep(POLL_SECONDS)


@contextmanager
def running_cluster() -> Iterator["Cluster"]:
    """A cluster whose hosts are all idle; taken down, with its folder, at the end of the block."""
    # In /tmp, not below pytest's: the path of a Unix socket may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder, ExitStack() as stack:
        cluster = Cluster(Path(folder))
        stack.callback(cluster.stop)
        cluster.start()
        yield cluster


class Cluster:
    """Hosts ``n1`` to ``n6`` and the login host ``ctl``; see slurm.conf.in for the partitions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._munged: subprocess.Popen[bytes] | None = None
        self._hosts: dict[str, subprocess.Popen[str]] = {}

    # ---- commands

    def run(
        self,
        host: str,
        *command: str | Path,
        check: bool = True,
        timeout: float = 60,
        cwd: Path = Path("/"),
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, with the environment of a fresh login and ``environment``.

        ``check``: raise RuntimeError with the command's output when it fails.
        """
        done = subprocess.run(
            [*self._enter(host), f"--wd={cwd}", "--", *map(str, command)],
            env=self.environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} on {host}: code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    @property
    def environment(self) -> dict[str, str]:
        """That of a fresh login."""
        return {
            "PATH": _SEARCH_PATH,
            "HOME": str(Path.home()),
            "LANG": "C.UTF-8",
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
        }

    def sbatch(self, *arguments: str | Path, cwd: Path, environment: Mapping[str, str] | None = None) -> str:
        """Submit on the login host, in ``cwd``; returns the job's id."""
        done = self.run(LOGIN, "sbatch", "--parsable", *arguments, cwd=cwd, environment=environment)
        return done.stdout.strip().splitlines()[-1]

    def scancel(self, *arguments: str) -> None:
        """E.g. ``"--batch", "--signal=USR1", job``."""
        self.run(LOGIN, "scancel", *arguments)

    # ---- jobs

    def job(self, job: str) -> Job:
        """The state of a job or, as ``ID_INDEX``, of a task of an array."""
        line = self.run(LOGIN, "scontrol", "--oneliner", "show", "job", job).stdout.strip()
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        code, killed_by = fields["ExitCode"].split(":")
        hosts = fields.get("NodeList", "(null)")
        return Job(
            id=fields["JobId"],
            state=fields["JobState"],
            reason=fields["Reason"],
            code=int(code),
            signal=int(killed_by),
            restarts=int(fields["Restarts"]),
            hosts=() if hosts in ("(null)", "") else self.hostnames(hosts),
            output=Path(fields.get("StdOut", "/nowhere")),
        )

    def hostnames(self, expression: str) -> tuple[str, ...]:
        """``n[1-3]`` -> n1, n2, n3."""
        return tuple(self.run(LOGIN, "scontrol", "show", "hostnames", expression).stdout.split())

    def wait(self, job: str, timeout: float) -> Job:
        """Until the job has finished; TimeoutError with its log after ``timeout`` seconds."""
        return self.wait_for_job(job, lambda now: now.finished, "finished", timeout)

    def wait_for_job(self, job: str, condition: Callable[[Job], object], what: str, timeout: float) -> Job:
        """Until ``condition`` holds of the job."""
        deadline = time.monotonic() + timeout
        while not condition(now := self.job(job)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} not {what} within {timeout} s\n{now.story}")
            time.sleep(POLL_SECONDS)
        return now

    # ---- processes of a host

    def pids(self, host: str, pattern: str) -> list[int]:
        """Processes of a host whose command line matches a regular expression, oldest first, as numbered there."""
        found = self.run(host, "pgrep", "--full", pattern, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self, host: str, name: str, *pids: int) -> None:
        """Send processes of a host the signal of this name, e.g. ``USR1``."""
        self.run(host, "kill", f"-{name}", *map(str, pids))

    # ---- faults

    def crash(self, host: str) -> None:
        """Power loss: all processes of the host vanish, and its network falls silent without a goodbye."""
        self._network("link", "delete", host)
        self._end_host(host)

    def boot(self, host: str) -> None:
        """Start a crashed host again."""
        self._start_host(host)
        self.start_slurmd(host)

    def cut(self, host: str) -> None:
        """Take the host's cable out."""
        self._network("link", "set", host, "down")

    def heal(self, host: str) -> None:
        """Put it back."""
        self._network("link", "set", host, "up")

    def kill_slurmd(self, host: str) -> None:
        """The daemon alone, until it has ended: steps live on."""
        pid = int((self.folder / host / "slurmd.pid").read_text())
        self.kill(host, "KILL", pid)
        ended = ("test", "!", "-d", f"/proc/{pid}")  # another one could not open its port before
        wait_until(lambda: self.run(host, *ended, check=False).returncode == 0, f"end of slurmd on {host}", timeout=60)

    def start_slurmd(self, host: str) -> None:
        """After ``kill_slurmd``, or on a booted host."""
        (self.folder / host / "slurmd.pid").unlink(missing_ok=True)
        self.run(host, "slurmd", "-N", host)

    @contextmanager
    def slurmd_timeout(self, seconds: int) -> Iterator[None]:
        """Within the block slurmctld gives a silent host up only after so long."""
        self._set_slurmd_timeout(seconds)
        try:
            yield
        finally:
            self._set_slurmd_timeout(SLURMD_TIMEOUT_SECONDS)

    def _set_slurmd_timeout(self, seconds: int) -> None:
        config = self.folder / "etc" / "slurm.conf"
        config.write_text(re.sub(r"(?m)^SlurmdTimeout=.*$", f"SlurmdTimeout={seconds}", config.read_text()))
        self.run(LOGIN, "scontrol", "reconfigure")

    def wait_idle(self, *hosts: str, timeout: float = 60) -> None:
        """Until these hosts are up and have no job."""

        def idle() -> bool:
            lines = self.run(LOGIN, "sinfo", "--noheader", "--Node", "--format=%N %t", check=False).stdout.split("\n")
            return set(hosts) <= {line.split()[0] for line in lines if line.endswith(" idle")}

        wait_until(idle, f"{', '.join(hosts)} idle", timeout)

    # ---- life

    def start(self) -> None:
        """Bring everything up."""
        self._write_files()
        self._start_munged()
        for host in (LOGIN, *HOSTS):
            self._start_host(host)
        self.run(LOGIN, "slurmctld")
        for host in HOSTS:
            self.start_slurmd(host)
        self.wait_idle(*HOSTS)

    def stop(self) -> None:
        """End every process of the cluster."""
        for host in tuple(self._hosts):
            self._end_host(host)
        if self._munged is not None:
            self._munged.kill()
            self._munged.wait()

    def _write_files(self) -> None:
        for name in ("etc", "state", "munge", "dev", LOGIN, *HOSTS):
            (self.folder / name).mkdir()
        etc = self.folder / "etc"
        nodes = "\n".join(f"NodeName={host} NodeAddr={_address(host)} Gres=gpu:{GPUS_PER_HOST}" for host in HOSTS)
        config = _CONFIG.read_text()
        for key, value in {
            "FOLDER": str(self.folder),
            "CONTROLLER": f"{LOGIN}({_address(LOGIN)})",
            "SLURMD_TIMEOUT": str(SLURMD_TIMEOUT_SECONDS),
            "NODES": nodes,
        }.items():
            config = config.replace(f"@{key}@", value)
        (etc / "slurm.conf").write_text(config)
        # slurmd always starts a cgroup plugin; where one is named it does not look at /sys/fs/cgroup.
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # Count= without File= is dropped for GPUs: clones of /dev/null stand for them.
        gpus = self.folder / "dev" / f"gpu[0-{GPUS_PER_HOST - 1}]"
        (etc / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={gpus}\n")
        for number in range(GPUS_PER_HOST):
            os.mknod(self.folder / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        names = [f"{_address(host)} {host}" for host in (LOGIN, *HOSTS)]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")

    def _start_munged(self) -> None:
        """As root with a key and a socket of its own."""
        folder = self.folder / "munge"
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_bytes(os.urandom(1024))
        files = [f"--{kind}={folder / name}" for kind, name in _MUNGE_FILES.items()]
        command = [*_ENDS_WITH_US, "munged", "--foreground", "--force", "--num-threads=2", *files]
        with (folder / "stderr").open("wb") as errors:
            self._munged = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stderr=errors)
        wait_until((folder / "socket").exists, "munged's socket", timeout=20)

    def _start_host(self, host: str) -> None:
        """Namespaces, process 1, and a cable to the bridge, which stands in the login host's network."""
        namespaces = ["--uts", "--mount", "--net", "--pid", "--fork", "--kill-child"]
        init = subprocess.Popen(
            [*_ENDS_WITH_US, "unshare", *namespaces, "bash", "-c", _INIT, "init", host, self.folder / "etc" / "hosts"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # unshare complains when its child is killed
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests, which then take the cluster down
        )
        self._hosts[host] = init
        assert init.stdout is not None
        if init.stdout.readline() != "ready\n":
            raise RuntimeError(f"host {host} did not come up")
        if host == LOGIN:
            self._network("link", "add", "bridge", "type", "bridge")
            device, host_network = "bridge", self._network
        else:
            peer = ["peer", "name", "eth0", "netns", str(self._init_pid(host))]
            self._network("link", "add", host, "type", "veth", *peer)
            self._network("link", "set", host, "master", "bridge", "up")
            device, host_network = "eth0", lambda *words: self._network(*words, host=host)
        host_network("addr", "add", f"{_address(host)}/24", "dev", device)
        host_network("link", "set", device, "up")

    def _end_host(self, host: str) -> None:
        """Returns when the last process of the host is gone: ``unshare`` waits for process 1, which goes last."""
        if self._hosts[host].poll() is None:
            os.kill(self._init_pid(host), signal.SIGKILL)
        self._hosts.pop(host).wait()

    def _init_pid(self, host: str) -> int:
        """Number of the host's process 1 on this machine: the child of ``unshare``."""
        pid = self._hosts[host].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", f"--target={self._init_pid(host)}", "--net", "--uts", "--mount", "--pid"]

    def _network(self, *words: str, host: str = LOGIN) -> None:
        """``ip ...`` in a host's network, seen with this machine's process numbers."""
        command = ["nsenter", f"--target={self._init_pid(host)}", "--net", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")


_ENDS_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
_MUNGE_FILES = {
    "key-file": "key",
    "socket": "socket",
    "pid-file": "pid",
    "log-file": "log",
    "seed-file": "seed",
}


def _address(host: str) -> str:
    return "10.77.0.1" if host == LOGIN else f"10.77.0.{10 + int(host[1:])}"


def main(command: Sequence[str]) -> int:
    """Bring a cluster up, run a command on its login host, take the cluster down."""
    if reason := missing():
        sys.exit(reason)
    with running_cluster() as cluster:
        sys.stderr.write(f"{', '.join(HOSTS)} are idle; files of the cluster: {cluster.folder}\n")
        words = [*cluster._enter(LOGIN), f"--wd={Path.cwd()}", "--", *(command or ["bash"])]
        return subprocess.run(words, env={**os.environ, **cluster.environment}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
