"""One cell of a PyTorch trainer: trained by its own loop, scored by `metric`.

Every trainer gets the same rows in the same order and batches, a linear warm-up
over a twentieth of the steps and then a linear fall of the rate to 0, which is
sparsify's schedule (its schedule-free default has none). All else is as each
library has it by default, in float32, except:

  sparsify_adam        `optimizer='adam'`. It scales no inputs: rows get norm
                       sqrt(D), as from the layer norm of the code that it
                       follows (Gao et al. 2024)
  sparsify             its default optimizer, schedule-free SignSGD; the same
  saelens              `normalize_activations='expected_average_only_in'`, by
                       which it scales rows to norm sqrt(D) itself, and b_dec
                       begins as the rows' mean
  dictionary_learning  `normalize_activations=True`, by which it scales rows to
                       a mean squared norm of 1 itself

Auxiliary losses for dead latents are left as they are too: sparsify's is off,
dictionary_learning's waits for 10 million silent tokens, SAELens's for 1000
silent steps.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import importlib.metadata
import io
import time
from typing import Any
from unittest import mock

import numpy as np

from experiments.peers import files, grid, metric, torch_libraries

_DISTRIBUTIONS = {
  'sparsify_adam': 'eai-sparsify',
  'sparsify': 'eai-sparsify',
  'saelens': 'sae-lens',
  'dictionary_learning': 'dictionary-learning',
}
# Rows that statistics are taken of.
_SAMPLE_ROWS = 32_768


def _sparsify(batches, cell, sample, device, **options) -> tuple:
  """Trains by sparsify; see `_TRAINERS`."""
  import torch

  d = sample.shape[1]
  scale = d**0.5 / _norm(sample)
  trainer = torch_libraries.sparsify(
    (scale * x_BD for x_BD in batches),
    d=d,
    n=cell.n,
    k=cell.k,
    batch=cell.batch,
    steps=cell.steps,
    device=device,
    lr=cell.rate,
    init_seeds=[cell.seed],
    save_every=cell.steps + 2,
    **options,
  )
  sae = trainer.saes['site']
  arrays = (
    sae.encoder.weight,
    sae.encoder.bias / scale,
    sae.W_dec,
    sae.b_dec / scale,
  )

  def forward(x_BD):
    with torch.no_grad():
      return sae(scale * x_BD).sae_out / scale

  return arrays, forward


def _saelens(batches, cell, sample, device) -> tuple:
  """Trains by SAELens; see `_TRAINERS`."""
  import torch

  d = sample.shape[1]
  torch.manual_seed(cell.seed)
  warmup = grid.warmup_steps(cell.steps)
  first = next(batches)
  # The norm is estimated on the first batch, which is then trained on.
  trainer = torch_libraries.saelens(
    _chained([first, first], batches),
    d=d,
    n=cell.n,
    k=cell.k,
    batch=cell.batch,
    steps=cell.steps,
    device=device,
    bias=sample.mean(0) * d**0.5 / _norm(first),
    options={'normalize_activations': 'expected_average_only_in'},
    lr=cell.rate,
    lr_warm_up_steps=warmup,
    # Two changes of the schedule at one step would be one.
    lr_decay_steps=cell.steps - warmup - 1,
    n_batches_for_norm_estimate=1,
  )
  sae = trainer.sae
  # What its `_fold_norm_topk` does.
  norm_N = sae.W_dec.norm(dim=-1)
  arrays = (
    sae.W_enc.T * norm_N[:, None],
    sae.b_enc * norm_N,
    sae.W_dec / norm_N[:, None],
    sae.b_dec,
  )

  def forward(x_BD):
    with torch.no_grad():
      return sae(x_BD)

  return arrays, forward


def _dictionary_learning(batches, cell, sample, device) -> tuple:
  """Trains by dictionary_learning; see `_TRAINERS`."""
  import torch

  warmup = grid.warmup_steps(cell.steps)
  trainer = torch_libraries.dictionary_learning(
    batches,
    d=sample.shape[1],
    n=cell.n,
    k=cell.k,
    steps=cell.steps,
    device=device,
    normalize=True,
    lr=cell.rate,
    seed=cell.seed,
    warmup_steps=warmup,
    decay_start=warmup + 1,
  )
  sae = trainer.ae
  arrays = sae.encoder.weight, sae.encoder.bias, sae.decoder.weight.T, sae.b_dec

  def forward(x_BD):
    with torch.no_grad():
      return sae(x_BD)

  return arrays, forward


def _chained(first: list, rest: Iterator) -> Iterator:
  yield from first
  yield from rest


def _norm(rows_BD) -> float:
  return float(rows_BD.norm(dim=-1).mean())


# From batches, cell, sample of the rows and device to the arrays w_enc_ND,
# b_enc_N, w_dec_ND, b_dec_D for unscaled rows, and the library's own forward of
# unscaled rows.
_TRAINERS: dict[str, Callable[..., tuple]] = {
  'sparsify_adam': lambda *inputs: _sparsify(
    *inputs,
    optimizer='adam',
    lr_warmup_steps=grid.warmup_steps(inputs[1].steps),
  ),
  'sparsify': _sparsify,
  'saelens': _saelens,
  'dictionary_learning': _dictionary_learning,
}


def run_cell(cell: grid.Cell, folder: str, device: str) -> dict[str, Any]:
  """Trains and scores one cell.

  Args:
    cell: which.
    folder: of the rows' files.
    device: torch's name of the device.

  Returns:
    The fields of its line in the results.

  Raises:
    ValueError: if the arrays don't reconstruct as the library does.
  """
  import torch

  order = files.order(folder, cell.seed, cell.steps * cell.batch)
  train = _on_device(folder, 'train', device)
  sample = _rows(train, np.arange(min(_SAMPLE_ROWS, len(train))), device)

  def batches():
    for step in range(cell.steps):
      numbers = order[step * cell.batch :][: cell.batch]
      yield _rows(train, numbers, device)

  began = time.monotonic()
  with _plain_float32(), _quiet():
    arrays, forward = _TRAINERS[cell.trainer](batches(), cell, sample, device)
  seconds = time.monotonic() - began
  arrays = metric.Arrays(
    *(a.detach().double().cpu().numpy() for a in arrays), cell.k
  )
  result = {
    'version': importlib.metadata.version(_DISTRIBUTIONS[cell.trainer]),
    'torch': torch.__version__,
    'device': _device_name(device),
    'train_seconds': round(seconds, 2),
  }
  if not all(np.isfinite(a).all() for a in vars(arrays).values()):
    names = ('validation_fvu', 'test_fvu', 'test_l0', 'test_silent')
    return result | dict.fromkeys((*names, 'train_silent'))
  passes = functools.partial(_forward, _as_tensors(arrays, device), cell.k)
  for split in ('validation', 'test'):
    rows = _on_device(folder, split, device)
    scores = metric.score(_blocks(rows, cell.n, device), passes)
    result |= {f'{split}_{name}': value for name, value in scores.items()}
  result['train_silent'] = metric.silent_share(
    _blocks(train, cell.n, device, np.unique(order)), passes
  )
  x_BD = _rows(rows, np.arange(min(metric.CHECKED_ROWS, len(rows))), device)
  own_BD = passes(x_BD.double()).output_BD
  # By torch in float64, and by the library.
  for theirs_BD in (own_BD, forward(x_BD)):
    result['forward_error'] = metric.check(
      arrays, x_BD.cpu().numpy(), theirs_BD.cpu().numpy(), scores['fvu']
    )
  return result


def _as_tensors(arrays: metric.Arrays, device: str) -> tuple:
  import torch

  names = ('w_enc_ND', 'b_enc_N', 'w_dec_ND', 'b_dec_D')
  return tuple(
    torch.from_numpy(getattr(arrays, name)).to(device) for name in names
  )


def _forward(tensors: tuple, k: int, x_BD) -> metric.Pass:
  """`metric.forward` by torch, which is several times as fast."""
  import torch

  w_enc_ND, b_enc_N, w_dec_ND, b_dec_D = tensors
  pre_BN = (x_BD - b_dec_D) @ w_enc_ND.T + b_enc_N
  vals_BK, idx_BK = pre_BN.topk(k, sorted=False)
  vals_BK = vals_BK.relu()
  output_BD = b_dec_D + torch.nn.functional.embedding_bag(
    idx_BK, w_dec_ND, per_sample_weights=vals_BK, mode='sum'
  )
  fired_N = torch.zeros(len(b_enc_N), dtype=torch.bool, device=x_BD.device)
  fired_N[idx_BK[vals_BK > 0]] = True
  return metric.Pass(output_BD, int((vals_BK > 0).sum()), fired_N.cpu().numpy())


def _blocks(rows, n_latents: int, device: str, numbers=None) -> metric.Blocks:
  """`metric.blocks` of tensors on the device."""
  size = metric.block_rows(n_latents)
  numbers = np.arange(len(rows)) if numbers is None else numbers

  def read():
    for start in range(0, len(numbers), size):
      yield _rows(rows, numbers[start : start + size], device).double()

  return read


@contextlib.contextmanager
def _plain_float32():
  """Products in float32 on any device, so that trainers differ in no rounding.

  On a GPU sparsify would use bfloat16 and TF32, the others float32.
  """
  import torch

  torch.set_float32_matmul_precision('highest')
  with (
    mock.patch.object(torch.cuda, 'is_bf16_supported', lambda *_: False),
    mock.patch.object(torch, 'set_float32_matmul_precision'),
  ):
    yield


@contextlib.contextmanager
def _quiet():
  """Without the libraries' lines and progress bars."""
  with (
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()),
  ):
    yield


@functools.cache
def _on_device(folder: str, split: str, device: str):
  """A split's rows: on a GPU a tensor, otherwise mapped."""
  rows = files.rows(folder, split)
  if device == 'cpu':
    return rows
  import torch

  return torch.from_numpy(np.asarray(rows, np.float32)).to(device)


def _rows(rows, numbers: np.ndarray, device: str):
  """Some rows as a tensor of float32 on the device."""
  import torch

  if isinstance(rows, torch.Tensor):
    return rows[torch.from_numpy(numbers).to(device)]
  return torch.from_numpy(np.asarray(rows[numbers], np.float32)).to(device)


def _device_name(device: str) -> str:
  import torch

  if torch.device(device).type == 'cuda':
    return torch.cuda.get_device_name(device)
  return 'cpu'
