"""The one door to DeepSpeed: an optimizer whose state is shared out between the ranks (ZeRO-1, ZeRO-2).

Rajbhandari et al. 2020 (arXiv 1910.02054). Each network gets an engine of its own from `deepspeed.initialize`:
Accelerate's DeepSpeed path binds one engine only, and with two networks trains in silence the wrong one. Parameters,
gradients and moments stay float32; autocast is ours. ZeRO-1 reduces gradients after the last micro-batch, ZeRO-2
after each and keeps this rank's part only. Both hold full parameters between updates, so that spectral norm, EMA,
sampling and checkpoints read the module as under DDP.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import ConfigError
from pipeline.world import World

T = TypeVar("T")

# Elements of one gradient reduction; DeepSpeed allocates a buffer of so many for each network, by default 2 GB.
_BUCKET_ELEMENTS = 2**24


def zero_stage(environment: Mapping[str, str] = os.environ) -> int:
    """Returns the ZeRO stage that `accelerate launch` was asked for; 0 is DDP.

    Raises:
        ConfigError: settings of the launcher's deepspeed_config that this training cannot keep, with the reason.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return 0
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # Accelerate's own default
    faults = []
    if stage == "3":
        faults.append(
            "zero_stage: 3 leaves parameters of shape (0,) outside of a forward pass, where spectral norm, the EMA, "
            "sampling and checkpoints read them"
        )
    elif stage not in ("1", "2"):
        faults.append(f"zero_stage: {stage} shares nothing out; distributed_type: MULTI_GPU is DDP")
    for name in ("offload_optimizer_device", "offload_param_device"):
        if (device := environment.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", "none")) != "none":
            faults.append(f"{name}: {device} needs DeepSpeed's own CPU optimizer; the moments of a SAGAN fit the GPU")
    if (clipping := environment.get("ACCELERATE_GRADIENT_CLIPPING", "0")) not in ("0", "0.0", "none"):
        faults.append(f"gradient_clipping: {clipping} is no part of the SAGAN recipe and is not applied under DDP")
    if (steps := environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        faults.append(f"gradient_accumulation_steps: {steps} is ours to do: train.accumulation_steps={steps}")
    if (path := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        faults.append(f"deepspeed_config_file: {path} is not read; zero_stage is all there is to choose")
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise ConfigError(
            f"the launcher asks for a DeepSpeed that this training cannot use:\n{lines}\n"
            "Use configs/accelerate/deepspeed_zero1.yaml or deepspeed_zero2.yaml as they are, or DDP"
        )
    return int(stage)


class Zero:
    """A network under ZeRO-1 or ZeRO-2: every rank has all parameters and updates its part of them.

    Args:
        module: float32 network, equal on every rank. Its parameters become views of one flat tensor.
        optimizer: torch.optim.Adam over the module's parameters; it is left with this rank's flat part of them.
        world: the processes that share it.
        stage: 1 or 2.

    Raises:
        ConfigError: DeepSpeed is absent, or world or precision do not fit.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, world: World, stage: int):
        if world.size == 1:
            raise ConfigError(
                "DeepSpeed's ZeRO shares the optimizer between processes, but one process started; give accelerate "
                "launch --num_processes N, or use configs/accelerate/one_process.yaml"
            )
        if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
            raise ConfigError(
                "train.precision=float64 does not go with DeepSpeed, whose weights are float32; use float32 or bf16, "
                "or DDP (configs/accelerate/one_machine.yaml)"
            )
        self._optimizer, self._world, self._device_type = optimizer, world, world.device.type
        self._shapes = [parameter.shape for parameter in module.parameters()]
        self._index_of = {id(parameter): index for index, parameter in enumerate(module.parameters())}
        num_elements = sum(shape.numel() for shape in self._shapes)
        self._engine, self._zero, *_ = _import_deepspeed(world).initialize(
            model=_WithAutocast(module, self._device_type),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # must be set; read by nothing that we use
                "gradient_clipping": 0.0,  # DeepSpeed's own default clips to 1
                "zero_optimization": {
                    "stage": stage,
                    "reduce_bucket_size": min(num_elements, _BUCKET_ELEMENTS),
                    "overlap_comm": False,
                    "compute_grad_norm": False,  # a norm would be read by the host at every step
                },
            },
        )
        (self._part,) = optimizer.param_groups[0]["params"]  # this rank's master weights, flat

    def __call__(self, *args: Tensor | None) -> Tensor:
        """Runs the network under the caller's autocast."""
        dtype = torch.get_autocast_dtype(self._device_type) if torch.is_autocast_enabled(self._device_type) else None
        with torch.autocast(self._device_type, enabled=False):
            output: Tensor = self._engine(dtype, *args)
        return output

    def accumulate(self, micro_batches: Sequence[T]) -> Iterator[T]:
        """Yields the micro-batches of one update."""
        for number, micro_batch in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            yield micro_batch

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's loss, a scalar."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradients(self) -> tuple[int, list[Tensor]]:
        """Returns this rank's part of the averaged gradients and the number of the first parameter it belongs to."""
        parameters = self._zero.params_in_partition[0]
        if not parameters:
            return 0, []
        # The last tensor may be padding without a parameter.
        return self._index_of[id(parameters[0])], list(self._zero.averaged_gradients[0][: len(parameters)])

    def apply(self) -> None:
        """Updates this rank's part, unless the optimizer's `found_inf` says no, and gathers the parameters."""
        self._engine.step()

    def optimizer_state(self) -> dict[str, Any]:
        """Returns Adam's state dict for the whole network on rank 0, {} elsewhere; every rank must call it."""
        state = self._optimizer.state.get(self._part, {})
        whole = {key: self._gather(value) for key, value in state.items() if value.ndim}
        if not self._world.is_main:
            return {}
        single = {key: value.cpu() for key, value in state.items() if not value.ndim}  # Adam's step count
        entries = {
            index: {key: tensors[index] for key, tensors in whole.items()}
            | {key: value.clone() for key, value in single.items()}
            for index in range(len(self._shapes) if state else 0)
        }
        (group,) = self._optimizer.state_dict()["param_groups"]
        return {"state": entries, "param_groups": [group | {"params": list(range(len(self._shapes)))}]}

    def restore(self, state: dict[int, dict[str, Tensor]]) -> None:
        """Takes this rank's part of the module's parameters and of Adam's `state` for the whole network."""
        self._zero.refresh_fp32_params()  # the masters, from the module's parameters
        mine = self._optimizer.state[self._part]
        for key in state[0] if state else ():
            values = [state[index][key] for index in range(len(self._shapes))]
            value = values[0] if key == "step" else self._slice(values)
            # In place where it exists: DeepSpeed keeps views of the moments.
            if key in mine:
                mine[key].copy_(value)
            else:
                mine[key] = value.to(self._part.device, torch.float32, copy=True)

    def _gather(self, part: Tensor) -> list[Tensor]:
        """Returns on rank 0 the tensors of all parameters that the ranks hold as equal flat parts, on the CPU."""
        parts = [torch.empty_like(part) for _ in range(self._world.size)] if self._world.is_main else None
        dist.gather(part, parts)
        if parts is None:
            return []
        numels = [shape.numel() for shape in self._shapes]
        flat = torch.cat(parts)[: sum(numels)].cpu()  # the rest is padding
        return [one.clone().view(shape) for one, shape in zip(torch.split(flat, numels), self._shapes, strict=True)]

    def _slice(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns this rank's flat part of all parameters' tensors, padded with zeros."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        size = self._part.numel()
        part = torch.zeros(size)
        found = flat[self._world.rank * size :][:size]
        part[: len(found)] = found
        return part


class _WithAutocast(nn.Module):
    """Runs a network under the caller's autocast, which DeepSpeed's engine would switch off around it (on CUDA)."""

    def __init__(self, module: nn.Module, device_type: str):
        super().__init__()
        self.module, self.device_type = module, device_type

    def forward(self, dtype: torch.dtype | None, *args: Tensor | None) -> Tensor:
        with torch.autocast(self.device_type, dtype, enabled=dtype is not None):
            output: Tensor = self.module(*args)
        return output


def _import_deepspeed(world: World) -> Any:
    """Imports DeepSpeed: seconds, hence only for those who use it."""
    # Else it takes the GPU of a machine whose run.device is cpu.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"the launcher asks for DeepSpeed, which cannot be imported ({error}); "
            "pip install 'sagan-at-scale[deepspeed]', or use DDP (configs/accelerate/one_machine.yaml)"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":
        # It would compile this for minutes, at every start on a fresh machine; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It fails on a parameter of shape () in DeepSpeed 0.19.8, and all ranks hold rank 0's parameters already.
    deepspeed.DeepSpeedEngine._broadcast_model = lambda engine: None
    return deepspeed
