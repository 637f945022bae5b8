"""One of two processes that share a batch; run by test_replicas.py, not by pytest.

Writes {"expected": one process on the whole batch, "got": this rank's part} with all tensors on the CPU.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from sagan import Discriminator, Generator, hinge_g
from sagan.layers import CrossReplicaBatchNorm2d

WORLD_SIZE = 2


def run_layer(rows: slice, sync: bool, device: str) -> dict[str, Tensor]:
    """Two training passes and one in eval mode of a single layer, on `rows` of fixed batches."""
    torch.manual_seed(0)
    layer = CrossReplicaBatchNorm2d(5, eps=1e-3, momentum=0.3, sync=sync).double()
    torch.nn.init.normal_(layer.weight)
    layer.to(device)
    result = {}
    for step in range(2):
        x = (3 * torch.randn(8, 5, 4, 4, dtype=torch.float64) + 2)[rows].to(device).requires_grad_()
        r = torch.randn(8, 5, 4, 4, dtype=torch.float64)[rows].to(device)
        y = layer(x)
        (y * r).sum().backward()
        assert x.grad is not None
        result |= {f"rows.y{step}": y.detach(), f"rows.dx{step}": x.grad}
    assert layer.weight.grad is not None and layer.bias.grad is not None
    result |= {"sum.dweight": layer.weight.grad, "sum.dbias": layer.bias.grad, **dict(layer.named_buffers())}
    result["rows.eval"] = layer.eval()(torch.ones(8, 5, 2, 2, dtype=torch.float64)[rows].to(device)).detach()
    return result


def run_networks(rows: slice, sync: bool, device: str) -> dict[str, Tensor]:
    """Two generator losses with backward passes; gradients averaged over ranks as DistributedDataParallel does."""
    torch.manual_seed(0)
    generator = Generator(16, 8, num_classes=3, z_dim=6, attention_resolution=8, sync_batch_norm=sync)
    discriminator = Discriminator(16, 8, num_classes=3, attention_resolution=8)
    generator.attention.gain.data.fill_(0.5)
    for network in (generator, discriminator):
        network.double().to(device)
    result = {}
    for step in range(2):
        z = torch.randn(6, 6, dtype=torch.float64)[rows].to(device)
        labels = torch.tensor([0, 1, 2, 2, 0, 2])[rows].to(device)
        images = generator(z, labels)
        loss = hinge_g(discriminator(images, labels))
        loss.backward()
        result |= {f"rows.images{step}": images.detach(), f"mean.loss{step}": loss.detach()}
    for name, network in (("generator", generator), ("discriminator", discriminator)):
        for key, parameter in network.named_parameters():
            assert parameter.grad is not None, key
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
                parameter.grad /= WORLD_SIZE
            result[f"{name}.{key}"] = parameter.grad
    return result | dict(generator.named_buffers())


def to_cpu(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy all tensors to the CPU."""
    return {key: value.detach().cpu() for key, value in result.items()}


def main(rank: int, store: str, output: str, device: str) -> None:
    """Run everything alone on whole batches, then as `rank` of two on its rows."""
    torch.set_num_threads(1)
    everything = slice(None)
    # Three and five rows: ranks need not hold equal parts.
    layer_rows = slice(0, 3) if rank == 0 else slice(3, 8)
    network_rows = slice(0, 3) if rank == 0 else slice(3, 6)
    expected = {
        "layer": to_cpu(run_layer(everything, True, device)),
        "networks": to_cpu(run_networks(everything, True, device)),
    }
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    got = {
        "layer": to_cpu(run_layer(layer_rows, True, device)),
        "layer_alone": to_cpu(run_layer(layer_rows, False, device)),
        "networks": to_cpu(run_networks(network_rows, True, device)),
    }
    dist.destroy_process_group()
    torch.save({"expected": expected, "got": got}, output)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4])
