"""A Slurm of two nodes, with a store and a tracking server on the test host that its nodes reach."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

REPO = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip")
INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testkey",
    "AWS_SECRET_ACCESS_KEY": "testsecret123",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Cluster:
    """Two nodes, and what a person at their login node does.

    Attributes:
        address: of the test host, as the nodes reach it.
        has_namespaces: whether each node is a machine of its own, which can be killed and has its own mounts.
        logs: directory of the jobs' logs.
        launcher: the file behind `accelerate` on the nodes.
    """

    def __init__(self, directory: Path, logs: Path, *prefix: str):
        self._directory, self.logs, self._prefix = directory, logs, prefix
        self._call("up", free_ports(), os.getpid())
        self.address = (directory / "address").read_text().strip()
        self.has_namespaces = (directory / "layout").read_text().strip() == "namespaces"
        self.environment = {name: text for name, text in os.environ.items() if not name.startswith(("AWS_", "SLURM_"))}
        self.environment |= CREDENTIALS | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPO),
        }
        self.launcher = Path(sys.executable).parent / "accelerate"

    def _call(self, command: str, *arguments: object) -> None:
        script = [str(REPO / "tests/servers/slurm.sh"), command, str(self._directory), *map(str, arguments)]
        done = subprocess.run([*self._prefix, *script], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        self._call("down")

    def command(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the checkout, as on a login node."""
        return subprocess.run(
            [str(word) for word in command], cwd=REPO, env=self.environment | environment,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def ask(self, *command: object, **environment: str) -> str:
        """Runs a command that must succeed, and returns what it printed."""
        done = self.command(*command, **environment)
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, *arguments: object, **environment: str) -> str:
        """Submits a job and returns its id."""
        return self.ask("sbatch", "--parsable", f"--output={self.logs}/%x-%j.out", *arguments, **environment)

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(word.split("=", 1) for word in self.ask("scontrol", "show", "job", job).split() if "=" in word)

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def wait_until(self, is_so: Callable[[], bool], seconds: float, job: str) -> None:
        """Waits, and tells of the job when it was in vain."""
        wait_until(is_so, seconds, lambda: self.tell(job))

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> None:
        self.wait_until(lambda: self.state(job) in states, seconds, job)

    def wait_for_end(self, job: str, seconds: float = 240) -> str:
        """Waits until the job is over, for good, and returns its last state."""
        self.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", seconds=seconds)
        return self.state(job)

    def wait_for_restart(self, job: str, restarts: int, seconds: float = 240, before: tuple[str, ...] = ()) -> None:
        """Waits until the job runs again; a requeued job is held for two minutes, which are cut short."""
        self.wait_until(lambda: self._restarts(job) == (restarts, "PENDING"), seconds, job)
        time.sleep(4)  # sooner, the controller may still be ending the run before
        # What a node did not answer is sent again after a minute, and would hit the new run: its ids are the same.
        self.wait_until(self._has_nothing_to_send, 150, job)
        self.ask("scontrol", "update", f"jobid={job}", *before, "starttime=now")
        self.wait_until(lambda: self.state(job) != "PENDING", 60, job)

    def _restarts(self, job: str) -> tuple[int, str]:
        facts = self.facts(job)
        return int(facts["Restarts"]), facts["JobState"]

    def _has_nothing_to_send(self) -> bool:
        return re.findall(r"^Agent (?:queue size|count): +(\d+)", self.ask("sdiag"), re.MULTILINE) == ["0", "0"]

    def log(self, job: str) -> str:
        """What the job's own log holds."""
        return "".join(path.read_text() for path in self.logs.glob(f"*-{job}.out"))

    def all_logs(self) -> str:
        """What the logs of all jobs so far hold."""
        return "".join(path.read_text() for path in self.logs.glob("*.out"))

    def tell(self, job: str) -> str:
        facts = {name: text for name, text in self.facts(job).items() if name in ("JobState", "Reason", "Restarts")}
        return f"job {job}: {facts}\n{self.log(job)}"

    def node_pid(self, number: int) -> int:
        return int((self._directory / f"run/node{number}.pid").read_text())

    def kill_node(self, number: int) -> None:
        """Ends a node with all that runs on it, at once."""
        if self.has_namespaces:
            os.kill(self.node_pid(number), signal.SIGKILL)
            return
        there = [psutil.Process(self.node_pid(number))]  # slurmd; its steps are no children of it
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == f"node{number}":
                    there += [process, process.parent()] if "slurmstepd" in process.parent().name() else [process]
        for process in there:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def start_node(self, number: int) -> None:
        self._call("node", number)

    def on_node(self, number: int, *command: object) -> None:
        """Runs a command with the mounts of a node."""
        self.ask("nsenter", f"--target={self.node_pid(number)}", "--mount", "--pid", *command)


class Forward(socketserver.ThreadingTCPServer):
    """Hands connections to an address of the test host on to a port of its loopback."""

    daemon_threads, block_on_close = True, False

    def __init__(self, host: str, port: int):
        super().__init__((host, 0), ForwardOne)
        self.port = port


class ForwardOne(socketserver.BaseRequestHandler):
    """One connection."""

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port)) as there:
            asking = threading.Thread(target=copy, args=(self.request, there))
            asking.start()
            copy(there, self.request)
            asking.join()


def copy(source: socket.socket, target: socket.socket) -> None:
    """Passes on what comes until one side has enough."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RD if end is source else socket.SHUT_WR)


def wait_until(is_so: Callable[[], bool], seconds: float, tell: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {seconds} s: {tell()}"
        time.sleep(0.5)


def free_ports() -> int:
    """A port such that it and the two after it are free."""
    for port in range(20_000 + os.getpid() % 10_000, 65_000, 3):
        try:
            for number in range(port, port + 3):
                with socket.socket() as listener:
                    listener.bind(("", number))
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def new_cluster(tmp_path_factory):
    """Function (command and flags that start it) -> context of a cluster."""
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; as root: {INSTALL}")

    @contextlib.contextmanager
    def new(*prefix: str):
        root = tmp_path_factory.mktemp("slurm")
        (root / "logs").mkdir()
        cluster = Cluster(root / "cluster", root / "logs", *prefix)
        try:
            yield cluster
        finally:
            cluster.close()

    return new


@pytest.fixture(scope="session")
def cluster(new_cluster):
    with new_cluster() as cluster:
        yield cluster


@pytest.fixture
def own_machines(cluster):
    """Skips where a node cannot be killed or have mounts of its own."""
    if not cluster.has_namespaces:
        pytest.skip("both nodes are daemons on this host; root with CAP_SYS_ADMIN and CAP_NET_ADMIN can do better")


@pytest.fixture(scope="session")
def new_location(cluster, s3_server):
    """Function that makes a bucket and returns its location, reached by nodes and test host alike."""
    from pipeline import s3_store

    server = Forward(cluster.address, s3_server.port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name, text in CREDENTIALS.items():
            patch.setenv(name, text)
        s3_store.client_of.cache_clear()

        def new() -> str:
            bucket = f"b{secrets.token_hex(6)}"
            location = f"s3://{bucket}/set?endpoint_url=http://{cluster.address}:{server.server_address[1]}"
            s3_store.client(s3_store.parse(location), attempts=5).create_bucket(Bucket=bucket)
            return location

        yield new
    s3_store.client_of.cache_clear()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def mlflow_uri(cluster, tmp_path_factory):
    """Address of an MLflow server on the test host; its database is beside it."""
    root, port = tmp_path_factory.mktemp("mlflow"), free_ports()
    uri = f"http://{cluster.address}:{port}"
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--host", cluster.address, "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{root}/mlflow.db"]
    command += ["--artifacts-destination", str(root / "served")]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (root / "server.log").open("w") as log:
        # Ends with its workers when the tests are gone, however they ended.
        outlive = '"$@" & while kill -0 "$0"; do sleep 1; done; kill -9 -- -$$'
        server = subprocess.Popen(
            ["bash", "-c", outlive, str(os.getpid()), *command],
            env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"{uri}/health", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_until(answers, 200, (root / "server.log").read_text)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


# One process a node, and so small that starting it takes longer than its steps.
SMALL = ["configs/demo.yaml", "run.device=cpu", "model.num_classes=3", "model.g_channels=2", "model.d_channels=4",
         "train.global_batch_size=8", "train.log_every_steps=5", "train.checkpoint_every_steps=20",
         "train.sample_every_steps=1000", "evaluation.num_images=64", "evaluation.kid_subset_size=32"]  # fmt: skip


@pytest.fixture(scope="session")
def stored_shards(new_location, tiny_shards) -> str:
    from pipeline.upload import upload

    location = new_location()
    upload(tiny_shards, location)
    return location


@pytest.fixture(scope="session")
def start(cluster, stored_shards, mlflow_uri, tmp_path_factory):
    """Function (name, sbatch flags, overrides) -> (job, run directory) of a small training of 90 steps."""
    root = tmp_path_factory.mktemp("runs")

    def start(name: str, flags: tuple[str, ...] = (), overrides: tuple[str, ...] = (), **more: str):
        places = more | {"RUN_DIR": str(root / name), "SHARDS": stored_shards, "MLFLOW_TRACKING_URI": mlflow_uri}
        small = [*SMALL, "train.steps=90", f"data.cache_dir={root}/blocks-{name}", *overrides]
        job = cluster.sbatch(*flags, "slurm/train_imagenet128.sh", *small, **places, PROCESSES_PER_NODE="1")
        return job, root / name

    return start


@pytest.fixture(scope="session")
def undisturbed(cluster, start):
    """The job and the run directory that others are compared with."""
    job, run_dir = start("undisturbed")
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.tell(job)
    return job, run_dir
