"""What the trainer and the evaluation tell about a run: to a journal first, from there to MLflow.

RUN/journal.jsonl holds every point, RUN/journals/ what is not the trainer's or is a file. `mlflow_sender` carries them
to MLflow in a process of its own, so that nothing here waits for a server or imports MLflow.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm import tqdm

from pipeline.config import Config, TrackingConfig, flatten, to_dict
from pipeline.journal import Journal, Record, read_records
from pipeline.locks import exclusive
from pipeline.mlflow_sender import Destination, count_unsent, remembered_store

Status = Literal["FINISHED", "KILLED", "FAILED"]  # done; stopped by a person or a scheduler; ended by an error

_CLOSE_SECONDS = 60.0  # the sender's last attempt may take so long, start of its process and a new database included
_FAILED_SECONDS = 20.0  # after an error less: the other ranks stand still until this one has ended
_BESIDE = "run.dir/mlflow.db"
_LONGEST_TEXT = 5000  # of a tag; MLflow refuses more


@dataclass(frozen=True)
class RunFacts:
    """What the configuration does not know about a run.

    Args:
        dataset_id: of the shards.
        world_size: number of processes.
        hostnames: of the machines they run on, each once.
        backend: ddp, zero1 or zero2.
        device: cpu or cuda.
        dataset: the training set as an input of the run: name, digest, source, source_type, profile, context; None:
            it is not told.
    """

    dataset_id: str
    world_size: int
    hostnames: tuple[str, ...]
    backend: str = "ddp"
    device: str = "cuda"
    dataset: Mapping[str, str] | None = None


class Tracker(Protocol):
    """What the trainer tells."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records numbers of one step; what a resumed run repeats is not recorded again."""

    def log_image(self, step: int, path: Path, series: str) -> None:
        """Records a picture, which stays where it is, as the next of a series that can be leafed through by step."""

    def log_files(self, step: int, paths: Sequence[Path], folder: str) -> None:
        """Records files, which stay where they are and are copied to a folder of the run's artifacts."""

    def log_model(self, step: int, path: Path) -> None:
        """Records an exported generator, which becomes a version of the run's registered model."""

    def log_note(self, step: int, name: str, text: str) -> None:
        """Records an event in words, a tag `name` of the run."""

    def close(self, status: Status) -> None:
        """Ends the record of this process."""


class NullTracker:
    """Tells nobody: stands in on the other ranks."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def log_image(self, step: int, path: Path, series: str) -> None:
        """Does nothing."""

    def log_files(self, step: int, paths: Sequence[Path], folder: str) -> None:
        """Does nothing."""

    def log_model(self, step: int, path: Path) -> None:
        """Does nothing."""

    def log_note(self, step: int, name: str, text: str) -> None:
        """Does nothing."""

    def close(self, status: Status) -> None:
        """Does nothing."""


def open_tracker(config: Config, facts: RunFacts, is_main: bool) -> Tracker:
    """Returns the run's tracker, the same MLflow run through all restarts; on other ranks than 0 one that does nothing.

    Raises:
        JournalError: a journal of the run is damaged.
    """
    return RunTracker(config, facts) if is_main else NullTracker()


class RunTracker:
    """Writes the journals and keeps a sender running beside.

    Args:
        config: of the run.
        facts: about its processes and data.
    """

    def __init__(self, config: Config, facts: RunFacts):
        self._run_dir = config.run_dir
        self._points = Journal(self._run_dir / "journal.jsonl")
        self._files = Journal(self._run_dir / "journals" / "files-samples.jsonl")
        # MLflow has experiments with `/` in their names, but no models.
        self._model_name = re.sub("[/:]", "-", f"{config.tracking.experiment}-{config.run.name}")
        self._points.append(_start_record(config, facts, self._points.starts))
        if slurm := _slurm_tags():
            _say("slurm: " + ", ".join(f"{name.removeprefix('slurm.')} {text}" for name, text in slurm.items()))
        self._sender: subprocess.Popen[bytes] | None = None
        if config.tracking.enabled:
            _introduce(config.tracking, self._run_dir, facts)
            started_seconds = self._points.starts[-1]["time_seconds"]
            self._sender = _start_sender(_destination(config.tracking, self._run_dir, started_seconds))

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        infinite = {name: value for name, value in metrics.items() if math.isinf(value)}
        tags = {f"infinite.{name}": f"{value} at step {step}; shown as 1.8e308" for name, value in infinite.items()}
        self._points.log(step, metrics, tags=tags)

    def log_image(self, step: int, path: Path, series: str) -> None:
        """See `Tracker`."""
        self._files.log(step, images={_inside(path, self._run_dir): series})

    def log_files(self, step: int, paths: Sequence[Path], folder: str) -> None:
        """See `Tracker`."""
        self._files.log(step, files={_inside(path, self._run_dir): folder for path in paths})

    def log_model(self, step: int, path: Path) -> None:
        """See `Tracker`."""
        self._files.log(step, models={_inside(path, self._run_dir): self._model_name})

    def log_note(self, step: int, name: str, text: str) -> None:
        """See `Tracker`."""
        self._points.log(step, tags={name: text})

    def close(self, status: Status) -> None:
        """Notes how the training ended and waits for the sender, a minute at most, less after an error."""
        self._points.append({"status": status})
        self._points.close()
        self._files.close()
        if self._sender is not None:
            _finish(self._sender, self._run_dir, _FAILED_SECONDS if status == "FAILED" else _CLOSE_SECONDS)


def log_evaluation(
    config: Config,
    run_dir: Path,
    step: int,
    metrics: Mapping[str, float],
    files: Sequence[Path] = (),
    tags: Mapping[str, str] | None = None,
    weights: str = "",
) -> None:
    """Records an evaluation, as `record_evaluation` does, and sends it with whatever is still unsent.

    A server that is away costs one line and a minute at most; the next evaluation or start sends the rest.

    Raises:
        JournalError: a journal of the run is damaged.
    """
    record_evaluation(run_dir, step, metrics, files, tags, weights)
    if any(count_unsent(run_dir)):  # the sender's start takes seconds
        send_unsent(config, run_dir)


def record_evaluation(
    run_dir: Path,
    step: int,
    metrics: Mapping[str, float],
    files: Sequence[Path] = (),
    tags: Mapping[str, str] | None = None,
    weights: str = "",
) -> None:
    """Journals an evaluation for the training's MLflow run, whether that is over, under way elsewhere, or never told.

    A (metric, step) or file that was recorded before of the same weights is not recorded again. When a run went back
    and made other weights of a step, theirs are added, and a tag says so. Several evaluators may do so at once.

    Args:
        run_dir: the run's directory.
        step: of the checkpoint that was evaluated.
        metrics: by name, such as `eval/fid`.
        files: copied to the run's artifacts, folder `evaluation/step-00001000`.
        tags: set on the run.
        weights: hash of the weights that were evaluated.

    Raises:
        JournalError: a journal of the run is damaged.
    """
    folder, journals = f"evaluation/step-{step:08d}", run_dir / "journals"
    name_of_step = f"evaluation-{step:08d}"
    name = name_of_step + (f"-{weights[:12]}" if weights else "")
    with exclusive(journals / "evaluation.lock"):  # a journal has one writer at a time
        earlier = [path for path in journals.glob(f"{name_of_step}*.jsonl") if path.stem != name]
        with Journal(journals / f"{name}.jsonl") as journal:
            recorded = _recorded_metrics(journal.path)
            for metric, before in recorded.items():
                if metric in metrics and str(float(metrics[metric])) != str(before):
                    _say(f"tracking: {metric} of step {step} is on record as {before}; {metrics[metric]} is not added")
            if not recorded and any(metrics.keys() & _recorded_metrics(path).keys() for path in earlier):
                text = "the run went back and made this step anew: of two points the later one counts"
                tags = {**(tags or {}), f"evaluation.replaced.step-{step:08d}": text}
            journal.log(step, metrics, tags=tags)
        with Journal(journals / f"files-{name}.jsonl") as journal:
            journal.log(step, files={_inside(path, run_dir): folder for path in files})


def send_unsent(config: Config, run_dir: Path) -> None:
    """Sends what earlier processes of the run could not; says so when something remains. Takes a minute at most."""
    if config.tracking.enabled:
        _finish(_start_sender(_destination(config.tracking, run_dir)), run_dir, _CLOSE_SECONDS)


def check_store(config: Config, run_dir: Path) -> str:
    """Returns where an evaluation would be recorded, having tried whether that answers; changes nothing.

    Raises:
        OSError: no answer from the server.
    """
    uri, chosen_by = _choose_uri(config.tracking, run_dir)
    if uri is None or not uri.startswith(("http:", "https:")):
        return f"{_without_password(uri) if uri else run_dir.parent / 'mlflow.db'} ({chosen_by})"
    shown = _without_password(uri)
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):
            return f"{shown} answers ({chosen_by})"
    except urllib.error.HTTPError as error:  # there is a server; it may want a password for this page
        return f"{shown} answers {error.code} ({chosen_by})"
    except OSError as error:
        raise OSError(
            f"{shown} ({chosen_by}) does not answer: {error}; results stay in the run directory, "
            "--sync sends them later"
        ) from error


def _start_record(config: Config, facts: RunFacts, starts: Sequence[Record]) -> Record:
    """Returns what is journaled when training begins or goes on.

    MLflow refuses to change a parameter: the parameters are the configuration of the first start, and what a later one
    changes (train.steps, say) becomes a tag `changed.train.steps` with all its values, oldest first.
    """
    now = {name: _text(value) for name, value in flatten(to_dict(config)).items()}
    first: Record = {} if starts else {"run_key": uuid.uuid4().hex, "params": now}
    configs = [start["config"] for start in starts] + [now]
    histories = {name: [values[name] for values in configs if name in values] for name in now}
    changed = {f"changed.{name}": " -> ".join(_unrepeated(values)) for name, values in histories.items()}
    tags = _tags(config, facts, len(starts)) | {name: text for name, text in changed.items() if " -> " in text}
    dataset = {"dataset": dict(facts.dataset)} if facts.dataset else {}
    return first | {"config": now, "tags": tags, "status": "RUNNING"} | dataset


def _tags(config: Config, facts: RunFacts, restarts: int) -> dict[str, str]:
    commit, dirty = git_state()
    unsynchronised = facts.world_size > 1 and not config.model.sync_batch_norm
    tags: dict[str, Any] = {
        "mlflow.user": os.environ.get("USER", "unknown"),
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit or "unknown",
        "git_dirty": dirty if commit else "unknown",
        "dataset_id": facts.dataset_id,
        "world_size": facts.world_size,
        "backend": facts.backend,
        "hostnames": " ".join(facts.hostnames),
        "restarts": restarts,
        "batch_norm": "unsynchronised, depends on world_size" if unsynchronised else "synchronised",
        "command": shlex.join(sys.argv),
        "recipe": next((Path(text).stem for text in sys.argv if text.endswith((".yaml", ".yml"))), "none"),
        "mlflow.note.content": _description(facts, commit),
    }
    tags |= _slurm_tags()
    return {name: _text(value) for name, value in tags.items()}


def _description(facts: RunFacts, commit: str) -> str:
    """Returns what the run's page says about it: what was trained on, and the command that does it again."""
    launcher, python = "", "python "
    if facts.world_size > 1:
        launched_by = {"zero1": "deepspeed_zero1", "zero2": "deepspeed_zero2"}.get(facts.backend, "one_machine")
        if facts.device == "cpu":
            launched_by = "cpu_two_processes"
        elif len(facts.hostnames) > 1 and facts.backend == "ddp":
            launched_by = "multi_node"
        launcher = (
            f"accelerate launch --config_file configs/accelerate/{launched_by}.yaml --num_processes {facts.world_size} "
        )
        python = ""
    dataset = facts.dataset or {"name": "unknown", "source": "{}"}
    place = json.loads(dataset["source"]).get("uri", "unknown")
    return "\n".join(
        [
            f"Trained on **{dataset['name']}** (`{place}`, id `{facts.dataset_id[:12]}`). Again:",
            "",
            "```",
            f"git checkout {commit or 'COMMIT'}",
            f"{launcher}{python}{shlex.join(sys.argv)}",
            "```",
            "",
            "The result does not depend on the number of processes. `run/` among the artifacts has the resolved "
            "configuration, the packages and the manifest of the data.",
        ]
    )


def _slurm_tags(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the Slurm job this process belongs to, as tags of the run; nothing outside of a job."""
    names = {"job_id": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "restarts": "SLURM_RESTART_COUNT"}
    # Slurm sets the count at the first requeue.
    values = {"SLURM_RESTART_COUNT": "0", **environment}
    return (
        {f"slurm.{tag}": values.get(name, "") for tag, name in names.items()} if "SLURM_JOB_ID" in environment else {}
    )


def git_state() -> tuple[str, bool]:
    """Returns the commit of the checkout this code lies in, "" without one, and whether files were changed since."""
    return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str:
    """Returns what git says about the checkout this file lies in; "" without git or a checkout."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _start_sender(destination: Destination) -> subprocess.Popen[bytes]:
    # A session of its own, so that a signal to the training's process group does not end it before the last points.
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "pipeline.mlflow_sender"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(destination)).encode() + b"\n")
    process.stdin.flush()
    return process


def _destination(tracking: TrackingConfig, run_dir: Path, started_seconds: float | None = None) -> Destination:
    home = run_dir.absolute().parent
    uri, _ = _choose_uri(tracking, run_dir)
    store = _BESIDE if uri is None else _without_password(uri)
    uri = uri or f"sqlite:///{home / 'mlflow.db'}"
    artifacts = tracking.artifact_location
    if artifacts is None and not uri.startswith(("http:", "https:", "databricks")):
        artifacts = (home / "mlartifacts").as_uri()
    return Destination(str(run_dir.absolute()), uri, store, tracking.experiment, artifacts, started_seconds)


def _introduce(tracking: TrackingConfig, run_dir: Path, facts: RunFacts) -> None:
    uri, chosen_by = _choose_uri(tracking, run_dir)
    shown = _without_password(uri) if uri else str(run_dir.parent / "mlflow.db")
    _say(f"tracking: {shown} ({chosen_by}), experiment {tracking.experiment}")
    if len(facts.hostnames) > 1 and (uri is None or uri.startswith("sqlite")):
        _say(
            f"warning: {len(facts.hostnames)} machines, and tracking in a sqlite file: sqlite on a network disk can "
            "lose its file when several machines write. For more than one run at a time start `mlflow server` "
            "and set tracking.uri"
        )


def _choose_uri(tracking: TrackingConfig, run_dir: Path) -> tuple[str | None, str]:
    """Returns the MLflow URI, None for the store beside the run directories, and what decided."""
    if tracking.uri is not None:
        return tracking.uri, "tracking.uri"
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, "MLFLOW_TRACKING_URI"
    # A later job without the variable must not open a second MLflow run elsewhere.
    remembered = remembered_store(run_dir)
    if remembered not in (None, _BESIDE) and "***" not in str(remembered):
        return remembered, "where this run went before"
    return None, "in run.dir; change with tracking.uri or MLFLOW_TRACKING_URI"


def _finish(sender: subprocess.Popen[bytes], run_dir: Path, seconds: float) -> None:
    """Lets the sender make its last attempt, and says what it did not manage."""
    assert sender.stdin is not None
    try:
        sender.stdin.close()
        sender.wait(seconds)
    except BrokenPipeError:
        sender.wait()
    except subprocess.TimeoutExpired:
        sender.kill()  # at any moment: what it sent and did not note is sent again and lands once
        sender.wait()
    points, files = count_unsent(run_dir)
    if points or files:
        _say(f"tracking: {points} points and {files} files are not sent yet; the next start or evaluation sends them")


def _recorded_metrics(journal: Path) -> dict[str, float]:
    records, _ = read_records(journal)
    return {name: value for record in records for name, value in record.get("metrics", {}).items()}


def _unrepeated(values: Sequence[str]) -> list[str]:
    return [value for index, value in enumerate(values) if index == 0 or value != values[index - 1]]


def _text(value: Any) -> str:
    """Returns a value as YAML and JSON write it, short enough for MLflow, without passwords in addresses."""
    return _without_password(value if isinstance(value, str) else json.dumps(value))[:_LONGEST_TEXT]


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def _inside(path: Path, run_dir: Path) -> str:
    """Returns the path relative to the run directory, so that this can be moved, or absolute when it lies outside."""
    absolute, home = path.absolute(), run_dir.absolute()
    return str(absolute.relative_to(home) if absolute.is_relative_to(home) else absolute)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
