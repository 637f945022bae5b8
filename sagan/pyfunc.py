"""An exported generator as a model for MLflow: `mlflow.pyfunc.load_model(URI).predict(rows)`.

A row asks for one image: `seed`, from which its noise is drawn, and its class `label`, unless the generator is
unconditional. The same row gives the same image in any batch.
"""

from typing import Any

import torch
from torch import Tensor

from sagan.portable import load

_IMAGES_PER_PASS = 16


def draw_z(seeds: list[int], z_dim: int) -> Tensor:
    """Return standard normal noise, (len(seeds), z_dim); row i is a function of seeds[i]."""
    return torch.stack([torch.randn(z_dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class Model:
    """What MLflow calls; see `sagan.load` for `directory`."""

    def __init__(self, directory: str) -> None:
        self.generator = load(directory)

    @torch.no_grad()
    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Make one image per row.

        Args:
            model_input: table (pandas) or mapping with columns `seed` and, with classes, `label`, whole numbers.
            params: none.

        Returns:
            (N, H, W, 3) uint8, a numpy array.
        """
        z = draw_z([int(seed) for seed in model_input["seed"]], self.generator.z_dim)
        labels = None
        if self.generator.num_classes:
            labels = torch.tensor([int(label) for label in model_input["label"]])
        parts = [slice(start, start + _IMAGES_PER_PASS) for start in range(0, len(z), _IMAGES_PER_PASS)]
        images = torch.cat([self.generator(z[part], None if labels is None else labels[part]) for part in parts])
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _load_pyfunc(path: str) -> Model:
    return Model(path)
