"""The one door to MLflow: `python -m pipeline.mlflow_sender` sends a run's journals, in a process beside rank 0.

A process of its own, because importing MLflow takes 3 s of CPU (10 s without byte-code caches) and 170 MB, and a new
database 5 s more: the trainer pays for none of it, and no server, however slow, can hold it up. It reads one line of
JSON from standard input (a `Destination`), sends what the journals hold and will hold, and ends when its standard input
ends, after one more attempt.

Each message may be repeated without harm, so that after a kill or a lost answer everything past the last noted byte is
sent again: a point carries the journal's timestamp, and MLflow keeps one row per (run, name, timestamp, step, value),
which is its own answer to clients that retry (SqlAlchemyStore._log_metrics); tags, parameters, files and the status are
set to what they are. Pictures and models have names that are functions of what they are.
"""

import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pipeline.journal import PATHS, Journal, Record, read_records
from pipeline.locks import exclusive

T = TypeVar("T")

_POLL_SECONDS = 5.0
_SAMPLES_PER_SYSTEM_POINT = 3
_LONGEST_WAIT_SECONDS = 300.0  # between attempts to reach a server that does not answer
_CHUNK_BYTES = 1 << 18
_THUMBNAIL_PIXELS = 256  # as MLflow's own
_METRICS_PER_CALL, _OTHERS_PER_CALL = 1000, 100  # limits of MLflow's log-batch request
_ENVIRONMENT = {
    # MLflow would try 8 times with 120 s each, and hide for minutes that the server is away; the journal is our retry.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing leaves for third parties
}


@dataclass(frozen=True)
class Destination:
    """What the sender must know.

    Args:
        run_dir: directory of the run; its name is the MLflow run's name.
        uri: MLflow tracking URI.
        store: what `uri` is called in RUN/mlflow_run.json and in messages: without passwords, and without the path
            when it is the store beside the run directories, so that these can be moved together.
        experiment: MLflow experiment, made when missing.
        artifact_location: of a new experiment; None leaves it to the server.
        started_seconds: `time_seconds` of the training's start record; None when no training stands behind this.
    """

    run_dir: str
    uri: str
    store: str
    experiment: str
    artifact_location: str | None
    started_seconds: float | None


@dataclass
class _State:
    """RUN/mlflow_run.json: which MLflow run this is, and how far each journal is known to be sent, in bytes."""

    store: str
    experiment: str
    run_key: str  # names the run before MLflow has; a tag there
    run_id: str | None = None
    sent: dict[str, int] = field(default_factory=dict)


def journals(run_dir: Path) -> list[Path]:
    """Lists a run's journals; those with files come last, so that a broken file store holds up no numbers."""
    main = [path for path in (run_dir / "journal.jsonl",) if path.exists()]
    return main + sorted((run_dir / "journals").glob("*.jsonl"), key=lambda path: ("files" in path.name, path.name))


def remembered_store(run_dir: Path) -> str | None:
    """Returns the `Destination.store` this run last went to, None when it went nowhere yet."""
    state = _read_state(run_dir)
    return state.store if state else None


def count_unsent(run_dir: Path) -> tuple[int, int]:
    """Returns how many points and how many files are not known to have reached MLflow."""
    state = _read_state(run_dir)
    points = files = 0
    for path in journals(run_dir):
        for record in read_records(path, _known_sent(state, path))[0]:
            points += len(record.get("metrics", ()))
            files += sum(len(record.get(part, ())) for part in PATHS)
    return points, files


class Sender:
    """Sends journals to one MLflow run, which it makes when it must.

    Args:
        destination: see there.
    """

    def __init__(self, destination: Destination):
        self._destination = destination
        self._run_dir = Path(destination.run_dir)
        self._state = self._find_state()
        self._told: set[str] = set()  # problems said, to be said once

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self._destination.uri)

    def run(self) -> None:
        """Sends until standard input ends, then tries once more."""
        sampler = _SystemSampler(self._run_dir) if self._destination.started_seconds is not None else None
        wait, next_attempt, ended, arrived = 0.0, 0.0, False, False
        while not ended:
            ended = _input_ends_within(min(wait, _POLL_SECONDS))
            if sampler is not None and not ended:
                try:
                    sampler.sample()
                except Exception as error:  # a machine that hides its counters; the points matter more
                    _say(f"tracking: no system metrics: {_reason(error)}")
                    sampler = None
            if ended or time.monotonic() >= next_attempt:
                arrived = self._attempt()
                wait = _POLL_SECONDS if arrived else min(max(2 * wait, _POLL_SECONDS), _LONGEST_WAIT_SECONDS)
                next_attempt = time.monotonic() + wait
        if arrived and self._training_died():
            with suppress(Exception):  # a store that went away this very moment; the points are there
                self._client.set_terminated(self._state.run_id, "FAILED")

    def deliver(self) -> int:
        """Sends what the journals hold and returns the number of points sent; waits for other senders of the run."""
        with exclusive(self._run_dir / "journals" / "sender.lock"):
            self._state = self._find_state()  # another may have gone on from where this one was
            return sum(self._deliver(path) for path in journals(self._run_dir))

    def _attempt(self) -> bool:
        """Delivers, and says so when that stops or starts to work."""
        try:
            points = self.deliver()
        except Exception as error:  # whatever MLflow, its database or its network come up with: training goes on
            problem = f"tracking: cannot send to {self._destination.store}: {_reason(error)}"
            if problem not in self._told:
                self._told.add(problem)
                _say(f"{problem}; going on without, {self._run_dir}/journal.jsonl keeps what is to be sent")
                if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                    _say(f"tracking: remove {self._run_dir}/mlflow_run.json to send everything to a new MLflow run")
            return False
        if self._told:
            self._told.clear()
            _say(f"tracking: {self._destination.store} answers again, {points} points sent")
        return True

    def _deliver(self, path: Path) -> int:
        start, points = _known_sent(self._state, path), 0
        while True:
            records, stop = read_records(path, start, _CHUNK_BYTES)
            if not records:
                return points
            points += self._send(records)
            self._state.sent[path.name] = start = stop
            self._write_state()

    def _send(self, records: list[Record]) -> int:
        from mlflow.entities import Metric, Param, RunTag

        run_id = self._state.run_id or self._find_or_create_run(records[0])
        metrics = [
            Metric(name, value, _milliseconds(record), record["step"])
            for record in records
            for name, value in record.get("metrics", {}).items()
        ]
        params = [Param(name, value) for record in records for name, value in record.get("params", {}).items()]
        tags = {name: value for record in records for name, value in record.get("tags", {}).items()}
        for metrics_part in _slices(metrics, _METRICS_PER_CALL):
            self._client.log_batch(run_id, metrics=metrics_part)
        for params_part in _slices(params, _OTHERS_PER_CALL):
            self._client.log_batch(run_id, params=params_part)
        for tags_part in _slices([RunTag(*item) for item in tags.items()], _OTHERS_PER_CALL):
            self._client.log_batch(run_id, tags=tags_part)
        for record in records:
            if "dataset" in record:
                self._send_dataset(run_id, record["dataset"])
            for path, folder in record.get("files", {}).items():
                self._send_file(run_id, self._run_dir / path, folder)
            for path, series in record.get("images", {}).items():
                self._send_image(run_id, self._run_dir / path, series, record)
            for path, name in record.get("models", {}).items():
                self._send_model(run_id, self._run_dir / path, name, record["step"])
        if changes := [record for record in records if "status" in record]:
            self._send_status(run_id, changes[-1])
        return len(metrics)

    def _send_file(self, run_id: str, path: Path, folder: str) -> None:
        if path.exists():
            self._client.log_artifact(run_id, str(path), folder)
        else:
            _say(f"tracking: {path} was removed before it could be sent")

    def _send_dataset(self, run_id: str, facts: dict[str, str]) -> None:
        """Notes the training set as an input of the run; MLflow keeps one row per (run, name, digest)."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        values = {name: facts[name] for name in ("name", "digest", "source_type", "source", "profile")}
        tags = [InputTag("mlflow.data.context", facts["context"])]
        self._client.log_inputs(run_id, [DatasetInput(Dataset(**values), tags)])

    def _send_image(self, run_id: str, path: Path, series: str, record: Record) -> None:
        """Adds a picture to a series, under the names of MlflowClient.log_image, with which the page shows a slider.

        That function would draw another random name, and so another picture, each time something is sent again.
        """
        from PIL import Image

        if not path.exists():
            return self._send_file(run_id, path, "images")
        number = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._state.run_key}/{path.name}/{record['step']}")
        name = f"{series.replace('/', '~')}+step+{record['step']}+timestamp+{_milliseconds(record)}+{number}"
        with tempfile.TemporaryDirectory() as directory, Image.open(path) as picture:
            full, small = Path(directory) / f"{name}.png", Path(directory) / f"{name}+compressed.webp"
            shutil.copyfile(path, full)
            picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
            picture.save(small)
            for file in (full, small):
                self._client.log_artifact(run_id, str(file), "images")
        self._client.set_tag(run_id, "mlflow.loggedImages", "True")

    def _send_model(self, run_id: str, path: Path, name: str, step: int) -> None:
        """Logs an exported generator as a pyfunc model and registers it, one version for each step of a run."""
        about = path / "config.json"
        if not about.exists() or json.loads(about.read_text())["provenance"]["step"] != step:
            return _say(f"tracking: {path} of step {step} was removed or replaced before it could be sent")
        folder = f"model/step-{step:08d}"  # each version keeps its own files
        with tempfile.TemporaryDirectory() as directory:
            _save_pyfunc(path, Path(directory) / "model")
            self._client.log_artifacts(run_id, str(Path(directory) / "model"), folder)
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        known = self._client.search_model_versions(f"name = '{name}'")
        if not any(one.run_id == run_id and one.tags.get("step") == str(step) for one in known):
            source = f"{self._client.get_run(run_id).info.artifact_uri}/{folder}"
            self._client.create_model_version(name, source, run_id, tags={"step": str(step)})

    def _send_status(self, run_id: str, record: Record) -> None:
        if record["status"] == "RUNNING":
            self._client.update_run(run_id, "RUNNING")
        else:
            self._client.set_terminated(run_id, record["status"], _milliseconds(record))

    def _find_or_create_run(self, first: Record) -> str:
        experiment_id, run_key = self._experiment_id(), self._state.run_key
        # A kill, or another process, may have come between the making of the run and the note of its id.
        found = self._client.search_runs([experiment_id], f"tags.run_key = '{run_key}'")
        start, tags, name = _milliseconds(first), {"run_key": run_key}, self._run_dir.name
        run = found[0] if found else self._client.create_run(experiment_id, start, tags, name)
        run_id = str(run.info.run_id)
        self._state.run_id = run_id
        self._write_state()
        return run_id

    def _experiment_id(self) -> str:
        name = self._destination.experiment
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # Without this tag MLflow's pages open on what it has for language models.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(self._client.create_experiment(name, self._destination.artifact_location, tags))

    def _training_died(self) -> bool:
        """Whether the training behind this process ended without saying how, and no other has gone on since."""
        if self._destination.started_seconds is None:
            return False
        records, _ = read_records(self._run_dir / "journal.jsonl")
        last = [record["time_seconds"] for record in records if "status" in record][-1]
        return bool(last == self._destination.started_seconds)

    def _find_state(self) -> _State:
        """Returns the noted state, or a new one: the journals then go from their beginning to a run of their own."""
        first = next(iter(read_records(path, max_bytes=1)[0] for path in journals(self._run_dir)), [])
        run_key = first[0].get("run_key") if first else None
        state = _read_state(self._run_dir)
        here = (self._destination.store, self._destination.experiment)
        if state and (state.store, state.experiment) == here and run_key in (None, state.run_key):
            return state
        return _State(*here, run_key or uuid.uuid4().hex)

    def _write_state(self) -> None:
        path = self._run_dir / "mlflow_run.json"
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(asdict(self._state), indent=2) + "\n")
        aside.replace(path)


def _save_pyfunc(export: Path, target: Path) -> None:
    """Writes an MLflow model of an exported generator; `sagan/` goes with it, so that it loads anywhere."""
    import mlflow.pyfunc
    import numpy as np
    import pandas as pd  # type: ignore[import-untyped]  # it comes without types
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    config = json.loads((export / "config.json").read_text())
    columns = ["seed", "label"] if config["num_classes"] else ["seed"]
    size = config["resolution"]
    mlflow.pyfunc.save_model(
        target,
        loader_module="sagan.pyfunc",
        data_path=str(export),
        code_paths=[str(Path(__file__).resolve().parent.parent / "sagan")],
        signature=ModelSignature(
            Schema([ColSpec("long", column) for column in columns]),
            Schema([TensorSpec(np.dtype("uint8"), (-1, size, size, 3))]),
        ),
        input_example=pd.DataFrame({column: [0, 1] for column in columns}),
        pip_requirements=[f"{package}=={version(package).split('+')[0]}" for package in ("torch", "safetensors")],
    )


class _SystemSampler:
    """Journals what MLflow's own monitors measure on this machine: CPU, memory, disk, network, GPUs.

    MLflow's SystemMetricsMonitor would send by itself, and ends for good the first time a server is away.
    """

    def __init__(self, run_dir: Path):
        self._journal = Journal(run_dir / "journals" / "system.jsonl")
        self._samples = 0

    @cached_property
    def _monitors(self) -> list[Any]:
        from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

        kinds: list[Any] = [cpu_monitor.CPUMonitor, disk_monitor.DiskMonitor, network_monitor.NetworkMonitor]
        gpu: Any = gpu_monitor.GPUMonitor
        monitors = [kind() for kind in kinds]
        with suppress(ImportError, RuntimeError):  # no NVIDIA GPU, or no nvidia-ml-py to ask it
            monitors.append(gpu())
        return monitors

    def sample(self) -> None:
        """Measures; every few times, appends the means as one point. The step counts points, as MLflow does it."""
        for monitor in self._monitors:
            monitor.collect_metrics()
        self._samples += 1
        if self._samples % _SAMPLES_PER_SYSTEM_POINT == 0:
            means = {name: value for monitor in self._monitors for name, value in monitor.aggregate_metrics().items()}
            step = self._journal.next_step("system/cpu_utilization_percentage")
            self._journal.log(step, {f"system/{name}": value for name, value in means.items()})
            for monitor in self._monitors:
                monitor.clear_metrics()


def _read_state(run_dir: Path) -> _State | None:
    try:
        return _State(**json.loads((run_dir / "mlflow_run.json").read_text()))
    except (FileNotFoundError, ValueError):  # emptied by a power cut, say: the run is found again by its key
        return None


def _known_sent(state: _State | None, journal: Path) -> int:
    sent = state.sent.get(journal.name, 0) if state else 0
    return sent if sent <= journal.stat().st_size else 0  # shorter than that: another file of the same name


def _milliseconds(record: Record) -> int:
    return int(record["time_seconds"] * 1000 + 0.5)


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _reason(error: Exception) -> str:
    """Returns one line: the innermost cause, where requests and urllib3 wrap it in their own words."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    cause = text.partition("Caused by ")[2].rpartition(": ")[2].strip("\"')")
    return (cause or text)[:200]


def _say(text: str) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress bar may stand there
    print(f"{clear}{text}", file=sys.stderr, flush=True)


def _input_ends_within(seconds: float) -> bool:
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], seconds)
    return bool(readable)


def main() -> None:
    """Reads a `Destination` as one line of JSON, then sends until standard input ends."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the training, whose last points are still to come
    with open(0, "rb", buffering=0, closefd=False) as standard_input:
        destination = Destination(**json.loads(standard_input.readline()))
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    Sender(destination).run()


if __name__ == "__main__":
    main()
