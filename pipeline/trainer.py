"""The one place that knows the order of things: build, resume, loop, checkpoint."""

import importlib.metadata
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from pipeline import attention, checkpoint, model_folder, results, run_files, sampling, snapshots
from pipeline.batch import Batch
from pipeline.block_cache import BlockCache
from pipeline.checkpoint import CheckpointError, TrainerState
from pipeline.config import Config, ConfigError, changed_hyperparameters, flatten, to_dict, to_yaml
from pipeline.estimate import describe_needs
from pipeline.gan import Gan
from pipeline.health import NonFinite, NonFiniteError, non_finite_buffers
from pipeline.host_memory import keep_freed_memory
from pipeline.loader import Loader
from pipeline.locks import RunTakenError, only_training
from pipeline.manifest import ShardSet, open_shard_set
from pipeline.noise import draw_z
from pipeline.order import PLAN_VERSION
from pipeline.progress import Meter, Progress, data_metrics
from pipeline.read_counts import ReadCounts
from pipeline.shard_file import write_file
from pipeline.stall import StallWatch
from pipeline.start_up import StartUp
from pipeline.stop import StopRequest
from pipeline.summary import check_data, describe, steps_per_epoch
from pipeline.tracking import NullTracker, RunFacts, Status, Tracker, open_tracker, send_unsent
from pipeline.world import World, configure_determinism
from sagan import attention_gains, spectral_norms

_ATTENTION_ROWS = 3  # images in the figure of attention maps
_LAUNCHES = {"ddp": "one_machine.yaml", "zero1": "deepspeed_zero1.yaml", "zero2": "deepspeed_zero2.yaml"}


def dry_run(config: Config, assumed_world_size: int | None = None) -> None:
    """Prints the resolved configuration, what would be trained and what it needs; builds nothing, writes nothing.

    Args:
        config: of the run.
        assumed_world_size: processes to reckon with; None: those that the configuration expects, or one.

    Raises:
        ConfigError: what cannot work on so many processes.
    """
    expected = config.run.expected_world_size
    world_size = assumed_world_size or expected or 1
    if expected and world_size != expected:
        raise ConfigError(
            f"run.expected_world_size is {expected}, --assume-world-size {world_size}: such a launch would be refused; "
            "change one of them"
        )
    shard_set = open_shard_set(config.data.shards)
    check_data(config, shard_set, world_size)
    print(to_yaml(config))
    print(describe(config, shard_set, world_size, config.run.device))
    print(describe_needs(config, world_size, shard_set.manifest.num_samples))


def train(config: Config) -> None:
    """Trains until `train.steps`, from the newest checkpoint of the run directory if there is one.

    Returns early, with a checkpoint published, after SIGTERM or SIGUSR1 to any rank. Ends the process when nothing
    moves for `health.stall_seconds`, from start-up to the last checkpoint.

    Raises:
        ConfigError: the configuration does not fit the data, the world or the run it resumes.
        CheckpointError: a checkpoint cannot be written, or the run directory is not shared.
        RunTakenError: another training holds the run directory.
        NonFiniteError: training went non-finite and rolling back did not help, or is switched off.
        ReplicaError: two ranks' replicas differ.
    """
    start_up = StartUp()
    with StallWatch(config.health.stall_seconds) as watch:
        # nccl's own time limit would end ranks before the watch tells where they stand.
        world = World(config.run.device, config.run.expected_world_size, 2 * config.health.stall_seconds)
        start_up.lap("processes")
        if world.device.type == "cpu":
            keep_freed_memory()
        # From here on ranks must agree on the step to stop at; before, a signal simply ends them.
        with StopRequest() as stop:
            shard_set = open_shard_set(config.data.shards)
            check_data(config, shard_set, world.size)
            world.check_same(
                flatten(to_dict(config)) | {"dataset id": shard_set.dataset_id, "plan version": PLAN_VERSION}
            )
            if world.is_main:
                print(describe(config, shard_set, world.size, str(world.device)), flush=True)
            with _only_training(config.run_dir, world, stop, watch):
                _check_shared_directory(config.run_dir, world)
                start_up.lap("data set")
                trainer = Trainer(config, world, shard_set)
                start_up.lap("networks")
                trainer.run(stop, watch, start_up)
                world.shutdown()


class ReplicaError(RuntimeError):
    """Ranks that must hold equal networks do not; the message names the ranks and the tensors."""


class Trainer:
    """A run: its networks, its data, its place in both.

    Args:
        config: of the run.
        world: the processes that share it.
        shard_set: its data, checked against the configuration.
    """

    def __init__(self, config: Config, world: World, shard_set: ShardSet):
        self.config, self.world, self.shard_set = config, world, shard_set
        configure_determinism(config.run.deterministic, world.device)
        self.gan = Gan(config, world)
        self.loader = build_loader(config, world, shard_set)
        self.tracker: Tracker = NullTracker()  # until it is certain that this run may go on
        self.meter = Meter()
        self.counts = ReadCounts()  # of the loader, when they were last logged
        self.progress = Progress(0, config.train.steps, world.is_main)
        self.step = 0  # updates done
        self.trouble: NonFinite | None = None
        self.redrawn: tuple[tuple[int, int], ...] = ()  # steps that were gone back on, see TrainerState

    def run(self, stop: StopRequest, watch: StallWatch, start_up: StartUp) -> None:
        """Resumes, trains, and leaves the run directory ready for whatever comes next.

        Args:
            stop: is asked once a step, on every rank.
            watch: is told of every step.
            start_up: is shown after the first step.
        """
        self._resume()
        self.world.check_same({"step": self.step})
        self._compare_replicas(self.gan.state_dicts())
        self.progress.advance(self.step)
        if self.step >= self.config.train.steps:
            self.progress.say(f"step {self.step} of {self.config.train.steps} is done; raise train.steps to go on")
            self._finish_what_was_interrupted()
            return
        self.tracker = open_tracker(self.config, self._facts(), self.world.is_main)
        status: Status = "FAILED"
        try:
            if self.world.is_main:
                self.tracker.log_files(self.step, run_files.write(self.config, self.shard_set), "run")
            start_up.lap("run directory")
            while self.step < self.config.train.steps and not self._run_until_trouble(stop, watch, start_up):
                self._roll_back()
            status = "FINISHED" if self.step >= self.config.train.steps else "KILLED"
            if status == "FINISHED":
                self._export()
        finally:
            self.progress.close()
            watch.alive()  # closing may take a minute by itself
            self.tracker.close(status)

    def _finish_what_was_interrupted(self) -> None:
        """Does what comes after the last checkpoint, if a kill came in between, and sends what is unsent."""
        is_whole = self.world.is_main and (
            (self.config.run_dir / "DONE").exists() and model_folder.finished_step(self.config.run_dir) == self.step
        )
        if self.world.broadcast(is_whole):
            if self.world.is_main:
                send_unsent(self.config, self.config.run_dir)
            return
        self.tracker = open_tracker(self.config, self._facts(), self.world.is_main)
        self._note_done()
        self._export()
        self.tracker.close("FINISHED")

    def _note_done(self) -> None:
        if self.world.is_main:
            write_file(self.config.run_dir / "DONE", f"{self.step}\n".encode())

    def _run_until_trouble(self, stop: StopRequest, watch: StallWatch, start_up: StartUp) -> bool:
        """Trains to the end or a requested stop and returns True, or returns False when it went non-finite."""
        train = self.config.train
        batches = self.loader.batches(self.step * train.num_d_steps)
        while self.step < train.steps:
            watch.alive()
            agreement = self.world.start_any(stop.requested())
            self._one_step(batches)
            start_up.tell_first_step(self.progress.say)
            self.progress.advance(self.step)
            stopping = agreement.result()
            last = self.step == train.steps or stopping
            log, save = self._due(train.log_every_steps, last), self._due(train.checkpoint_every_steps, last)
            snapshot = self._is_snapshot_due()
            if (log or save or snapshot) and self._find_trouble():
                return False
            if log:
                self._log()
            if self._due(train.sample_every_steps, self.step == train.steps):
                self._sample()  # before the checkpoint: a resume from it makes no earlier pictures
            if snapshot:
                self._snapshot()  # and no earlier snapshots
            if save:
                self._save()
            if stopping and self.step < train.steps:
                self._report_stop(stop)
                return True
        self._note_done()
        self.progress.say(f"done: {self.step} steps, {self.config.run_dir}")
        return True

    def _one_step(self, batches: Iterator[Batch]) -> None:
        """One generator update and the discriminator updates before it (section 5 of the paper's code: model.py)."""
        step, started = self.step + 1, time.perf_counter()
        reals = [next(batches) for _ in range(self.config.train.num_d_steps)]
        self.meter.add_data_wait(time.perf_counter() - started)
        attempt = sum(first <= step <= last for first, last in self.redrawn)
        self.meter.add(self.gan.update(step, reals, attempt))
        self.step = step

    def _log(self) -> None:
        losses = self.meter.means(self.world)  # the host waits for the device here, once per interval
        seconds, data_seconds, steps = self.meter.times()
        all_waits, all_counts = zip(*self.world.gather((data_seconds, self.loader.counts - self.counts)), strict=True)
        data_seconds, self.counts = max(all_waits), self.loader.counts
        images = steps * self.config.train.global_batch_size * self.config.train.num_d_steps
        metrics = {f"train/{name}": value for name, value in losses.items()}
        metrics |= {
            "train/lr_g": self.config.optimizer.lr_g,
            "train/lr_d": self.config.optimizer.lr_d,
            "throughput/images_per_second": images / seconds,
            "time/step_seconds": seconds / steps,
            "time/data_seconds": data_seconds / steps,
            "time/data_wait_percent": 100 * data_seconds / seconds,
            "progress/epoch": self.step / steps_per_epoch(self.config, self.shard_set),
            "progress/images_seen": float(self._images_seen()),
        }
        metrics |= data_metrics(sum(all_counts, ReadCounts()), seconds)
        for network in self.gan.players:
            norms = torch.stack(list(spectral_norms(network.module).values()))
            metrics[f"spectral_norm/{network.name}_max"] = float(norms.max())
            metrics[f"spectral_norm/{network.name}_mean"] = float(norms.mean())
            for name, gain in attention_gains(network.module).items():
                metrics[f"attention/{network.name}_{name}"] = float(gain)
        self.tracker.log_metrics(self.step, metrics)
        self.progress.show(self.step, metrics)

    def _save(self) -> None:
        started = time.perf_counter()
        networks = self.gan.state_dicts()
        self._compare_replicas(networks)
        optimizers = {player.name: player.optimizer_state() for player in self.gan.players}

        def save() -> None:
            path = checkpoint.save(self.config.run_dir, self._state(), networks, optimizers)
            checkpoint.prune(self.config.run_dir, self.config.train.keep_checkpoints, self._best_step())
            self.progress.say(f"checkpoint {path} in {time.perf_counter() - started:.1f} s")

        self._on_rank_0(save)

    def _snapshot(self) -> None:
        networks = {"ema": self.gan.ema.module.state_dict(), "generator": self.gan.generator.module.state_dict()}
        self._on_rank_0(lambda: snapshots.save(self.config.run_dir, self._state(), networks))

    def _on_rank_0(self, save: Callable[[], object]) -> None:
        """Writes on rank 0; what goes wrong there stops every rank."""
        error = ""
        if self.world.is_main:
            try:
                save()
            except CheckpointError as failure:
                error = str(failure)
        if error := self.world.broadcast(error):
            raise CheckpointError(error)

    def _report_stop(self, stop: StopRequest) -> None:
        """Says why training stopped, and how long the rank that heard of it first had to wait for the checkpoint."""
        seconds, reason = max(self.world.gather(stop.heard()))
        self.tracker.log_metrics(self.step, {"time/stop_seconds": seconds})
        self.progress.say(
            f"stopped by {reason} at step {self.step}, checkpoint published {seconds:.1f} s after the signal; "
            "the same command again goes on"
        )

    def _best_step(self) -> int | None:
        """Returns the step of the best FID if an evaluation has told; a damaged result file stops no training."""
        try:
            return results.best_step(self.config.run_dir, checkpoint.published(self.config.run_dir))
        except results.ResultError as error:
            self.progress.say(f"the best checkpoint is not known: {error}")
            return None

    def _sample(self) -> None:
        if self.world.is_main:
            model = self.config.model
            grid = sampling.sample_grid(self.gan.ema.module, self.config.run.seed, model.z_dim, model.num_classes)
            path = self.config.run_dir / "samples" / f"step-{self.step:08d}.png"
            sampling.save_png(grid, path)
            self.tracker.log_image(self.step, path, "samples")
            self._draw_attention()

    def _draw_attention(self) -> None:
        """Shows where both networks look, for one sample of each of a few classes."""
        seed, model = self.config.run.seed, self.config.model
        classes = sampling.few(sampling.grid_classes(model.num_classes), _ATTENTION_ROWS)
        z = draw_z(seed, "grid_z", 0, 0, len(classes) or _ATTENTION_ROWS, model.z_dim)
        labels = torch.tensor(classes) if classes else None
        titles = [f"class {label}" for label in classes] or [""] * _ATTENTION_ROWS
        figure = attention.draw_figure(self.gan.ema.module, self.gan.discriminator.module, z, labels, titles)
        if figure is not None:
            path = self.config.run_dir / "attention" / f"step-{self.step:08d}.png"
            sampling.save_picture(figure, path)
            self.tracker.log_image(self.step, path, "attention")

    def _export(self) -> None:
        """Leaves the averaged generator as a folder of its own, and tells the tracker, which makes it a model."""
        if self.world.is_main:
            path = model_folder.write_finished(self.gan.ema.module, self.config, self.shard_set, self.step)
            self.tracker.log_model(self.step, path)

    def _resume(self) -> None:
        """Takes up the newest whole checkpoint; rank 0 chooses, so that all take the same."""
        path, problems = checkpoint.newest(self.config.run_dir) if self.world.is_main else (None, [])
        path, problems = self.world.broadcast((path, problems))
        for problem in problems:
            self.progress.say(problem)
        if path is None:
            return
        found = checkpoint.load(path)
        self._check_resumable(found.state, path)
        self._restore(found)
        self.redrawn = found.state.redrawn
        self.progress.say(f"resumed from {path}")

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        if self.world.is_main:
            snapshots.remove_after(self.config.run_dir, found.state.step)
        for player in self.gan.players:
            player.restore(found.networks[player.name], found.optimizers[player.name])
        self.gan.ema.module.load_state_dict(found.networks["ema"])
        self.step = found.state.step

    def _check_resumable(self, state: TrainerState, path: Path) -> None:
        if changed := changed_hyperparameters(state.config, self.config):
            keys = ", ".join(line.split(":")[0] for line in changed)
            lines = "\n".join(f"  {line}" for line in changed)
            raise ConfigError(
                f"{path} was made with other hyperparameters:\n{lines}\n"
                f"Put them back, choose another run.name, or accept the change with run.accept_changes=[{keys}]"
            )
        if state.dataset_id != self.shard_set.dataset_id and "data.shards" not in self.config.run.accept_changes:
            raise ConfigError(
                f"{path} was trained on data set {state.dataset_id[:12]}, data.shards={self.config.data.shards} is "
                f"{self.shard_set.dataset_id[:12]}; use the same shards or accept with run.accept_changes=[data.shards]"
            )
        if state.plan_version != PLAN_VERSION:
            raise ConfigError(
                f"{path} read its data in order version {state.plan_version}, this code has {PLAN_VERSION}; "
                "finish the run with the code that began it"
            )
        backend = self.gan.generator.backend
        if state.backend != backend and "backend" not in self.config.run.accept_changes:
            raise ConfigError(
                f"{path} was trained with {state.backend}, this launch is {backend} (ddp: DDP or one process; zero1, "
                f"zero2: DeepSpeed). Launch as before (configs/accelerate/{_LAUNCHES[state.backend]}), choose another "
                "run.name, or take over its weights, EMA and Adam moments with run.accept_changes=[backend]; sums are "
                "then taken in another order, so the last digits will differ"
            )
        if state.backend != backend:
            self.progress.say(f"resuming with {backend} what ran with {state.backend}, as run.accept_changes says")
        if state.world_size != self.world.size:
            self.progress.say(
                f"resuming on {self.world.size} process(es) what ran on {state.world_size}: same samples, noise and "
                "labels at every step; sums are taken in another order, so the last digits will differ"
            )

    def _find_trouble(self) -> bool:
        """Looks for non-finite numbers, in the same place on every rank; waits for the device."""
        players = self.gan.players[::-1]  # the discriminator's update comes first
        buffers = {player.name: non_finite_buffers(player.module) for player in players}
        found = [player.watch.report() for player in players]
        for on_rank in self.world.gather(buffers):
            found += [NonFinite(name, self.step, tuple(bad), "buffer") for name, bad in on_rank.items() if bad]
        self.trouble = next((trouble for trouble in found if trouble), None)
        return self.trouble is not None

    def _roll_back(self) -> None:
        """Goes back to the last checkpoint, as BN and SN buffers have moved, and on from there with other noise."""
        trouble, health, rollbacks = self.trouble, self.config.health, len(self.redrawn)
        if health.on_failure == "stop" or rollbacks >= health.max_rollbacks:
            tried = "Other noise did not help, so the fault is in the numbers: l" if rollbacks else "L"
            raise NonFiniteError(
                f"{trouble}. Stopped after {rollbacks} rollback(s) (health.on_failure={health.on_failure}, "
                f"health.max_rollbacks={health.max_rollbacks}). {tried}ower optimizer.lr_d and lr_g (with "
                "run.accept_changes) or use train.precision=float32"
            )
        path, _ = self.world.broadcast(checkpoint.newest(self.config.run_dir) if self.world.is_main else (None, []))
        if path is None:
            raise NonFiniteError(f"{trouble}, before the first checkpoint: there is nothing to go back to")
        reached = self.step
        self._restore(checkpoint.load(path))
        self.redrawn = (*self.redrawn, (self.step + 1, reached))
        for player in self.gan.players:
            player.watch.reset()
        self.meter = Meter()
        text = (
            f"{trouble}; rolled back to {path} ({rollbacks + 1} of {health.max_rollbacks}), "
            f"steps {self.step + 1} to {reached} draw other noise now"
        )
        self.progress.say(text)
        self.tracker.log_note(reached, f"rollback.{rollbacks + 1}", text)

    def _compare_replicas(self, networks: dict[str, dict[str, Tensor]]) -> None:
        if not self.config.model.sync_batch_norm:  # the running statistics are then each rank's own
            networks = {
                network: {name: tensor for name, tensor in tensors.items() if ".running_" not in name}
                for network, tensors in networks.items()
            }
        all_digests = self.world.gather(checkpoint.digests(networks) if self.world.size > 1 else {})
        for rank, digests in enumerate(all_digests):
            if names := [name for name, digest in digests.items() if digest != all_digests[0][name]]:
                raise ReplicaError(
                    f"rank {rank} holds other values than rank 0 at step {self.step} in {len(names)} tensor(s), "
                    f"first {names[0]}: the replicas went apart. No checkpoint was written; the same command again "
                    "goes on from the one before"
                )

    def _state(self) -> TrainerState:
        return TrainerState(
            step=self.step,
            images_seen=self._images_seen(),
            next_batch_number=self.step * self.config.train.num_d_steps,
            plan_version=PLAN_VERSION,
            dataset_id=self.shard_set.dataset_id,
            world_size=self.world.size,
            backend=self.gan.generator.backend,
            redrawn=self.redrawn,
            config=to_dict(self.config),
            versions={name: importlib.metadata.version(name) for name in ("torch", "accelerate", "safetensors")},
        )

    def _images_seen(self) -> int:
        return self.step * self.config.train.num_d_steps * self.config.train.global_batch_size

    def _due(self, every_steps: int, last: bool) -> bool:
        return last or self.step % every_steps == 0

    def _is_snapshot_due(self) -> bool:
        every_steps = self.config.evaluation.every_steps
        return every_steps is not None and (self.step % every_steps == 0 or self.step == self.config.train.steps)

    def _facts(self) -> RunFacts:
        hostnames = tuple(dict.fromkeys(self.world.gather(socket.gethostname())))
        return RunFacts(
            self.shard_set.dataset_id,
            self.world.size,
            hostnames,
            self.gan.generator.backend,
            self.world.device.type,
            run_files.describe_dataset(self.shard_set),
        )


def build_loader(config: Config, world: World, shard_set: ShardSet) -> Loader:
    """Returns the loader of this rank's rows.

    Raises:
        ConfigError: the set does not give such batches.
    """
    try:
        return Loader(
            shard_set,
            image_size=config.model.resolution,
            seed=config.run.seed,
            global_batch_size=config.train.global_batch_size,
            accumulation_steps=config.train.accumulation_steps,
            rank=world.rank,
            world_size=world.size,
            num_workers=config.data.num_workers,
            prefetch_batches=config.data.prefetch_batches,
            horizontal_flip=config.data.horizontal_flip,
            pin_memory=world.device.type == "cuda",
            cache=BlockCache(config.data.cache_dir, config.data.cache_bytes),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def _only_training(run_dir: Path, world: World, stop: StopRequest, watch: StallWatch) -> Iterator[None]:
    """Rank 0 holds the run directory for all; where it stays taken, all end."""

    def is_worth_waiting() -> bool:
        watch.alive()
        return not stop.requested()

    with ExitStack() as held:
        error = ""
        if world.is_main:
            try:
                held.enter_context(only_training(run_dir, lambda text: print(text, flush=True), is_worth_waiting))
            except RunTakenError as taken:
                error = str(taken)
        if error := world.broadcast(error):
            raise RunTakenError(error)
        yield


def _check_shared_directory(run_dir: Path, world: World) -> None:
    """Finds a run directory that the nodes do not share, before step 0 and not at the first checkpoint."""
    token, path = world.broadcast(secrets.token_hex(8)), run_dir / ".token"
    if world.is_main:
        path.write_text(token)
    world.barrier()
    seen = path.read_text() if path.exists() else None
    strangers = [rank for rank, other in enumerate(world.gather(seen)) if other != token]
    if strangers:
        raise CheckpointError(
            f"run directory {run_dir} (run.dir, run.name) is not the same directory on ranks {strangers} as on rank 0; "
            "put run.dir on a file system that every node sees"
        )
    world.barrier()
    if world.is_main:
        path.unlink()
