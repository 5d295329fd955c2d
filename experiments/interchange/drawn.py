"""What the golden autoencoders have in common."""

import pathlib

import numpy as np
import torch

D, N, K, ROWS = 6, 20, 4, 5


def draw(module: torch.nn.Module) -> None:
  """Draws all floating weights of a module, thresholds above zero."""
  for name, value in [*module.named_parameters(), *module.named_buffers()]:
    if value.is_floating_point():
      drawn = torch.randn(value.shape) * 0.5
      value.copy_(drawn.abs() if 'threshold' in name else drawn)


def activations() -> torch.Tensor:
  return torch.randn(ROWS, D, dtype=torch.float64) * 3 + 1


def save_expected(folder: pathlib.Path, **arrays: torch.Tensor) -> None:
  arrays = {name: x.detach().numpy() for name, x in arrays.items()}
  np.savez(folder / 'expected.npz', **arrays)


def made(folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir(parents=True)
  return folder
