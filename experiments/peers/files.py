"""The rows as plain files, which every trainer reads.

  train.npy       [T, D], rows to train on
  validation.npy  rows of other documents, on which the rate is chosen
  test.npy        rows of yet others, which figures are reported of
  order_S.npy     integers: the row of train.npy at each place of training with
                  seed S; without it rows are taken in the order of the file,
                  again and again

Rows are float32 (float16 is read too), each centred on its own mean and of
norm 1.
"""

import hashlib
import os

import numpy as np

SPLITS = ('train', 'validation', 'test')


def path(folder: str, split: str) -> str:
  """The file of a split's rows."""
  return os.path.join(folder, f'{split}.npy')


def order_path(folder: str, seed: int) -> str:
  """The file of a seed's order."""
  return os.path.join(folder, f'order_{seed}.npy')


def rows(folder: str, split: str) -> np.ndarray:
  """A split's rows [R, D], mapped."""
  return np.load(path(folder, split), mmap_mode='r')


def counts(folder: str) -> dict[str, int]:
  """Rows of each split."""
  return {split: len(rows(folder, split)) for split in SPLITS}


def order(folder: str, seed: int, n_tokens: int) -> np.ndarray:
  """The rows that a run of some tokens is trained on, in order, int64.

  Raises:
    ValueError: if the file has fewer.
  """
  if not os.path.exists(order_path(folder, seed)):
    return np.arange(n_tokens) % len(rows(folder, 'train'))
  numbers = np.load(order_path(folder, seed), mmap_mode='r')
  if len(numbers) < n_tokens:
    raise ValueError(
      f'{order_path(folder, seed)} has {len(numbers)} places, a run needs '
      f'{n_tokens}'
    )
  return np.asarray(numbers[:n_tokens], np.int64)


def digest(folder: str) -> str:
  """A digest of all rows, 16 hexadecimal digits."""
  whole = hashlib.sha256()
  for split in SPLITS:
    with open(path(folder, split), 'rb') as file:
      whole.update(hashlib.file_digest(file, 'sha256').digest())
  return whole.hexdigest()[:16]
