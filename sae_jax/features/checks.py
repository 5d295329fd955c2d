"""What blocks of latents must hold to be of a feature table."""

from collections.abc import Mapping

import numpy as np

from sae_jax import errors
from sae_jax.features.columns import Column, COLUMNS


def check(
  arrays: Mapping[str, np.ndarray],
  first: int,
  n_latents: int,
  vocabulary_size: int | None = None,
) -> None:
  """Checks the numbers of a block of latents.

  Args:
    arrays: some columns of consecutive latents, or shared ones, of the shapes
      and types that are declared.
    first: the first of the latents.
    n_latents: number of all latents.
    vocabulary_size: number of tokens of the subject; None if it is not known.

  Raises:
    UserError: if a number is none that the column can have.
  """
  for name, array in arrays.items():
    column = COLUMNS[name]
    _check_bounds(name, column, array)
    largest = int(np.max(array, initial=-1)) if column.dtype == 'int32' else -1
    if column.is_token and vocabulary_size is not None:
      if largest >= vocabulary_size:
        raise errors.UserError(
          f'{name} holds token {largest} but the vocabulary ends at '
          f'{vocabulary_size - 1}: use the vocabulary of the probed subject'
        )
    elif column.is_latent and largest >= n_latents:
      raise errors.UserError(
        f'{name} holds latent {largest} of {n_latents}: run sae-probe again'
      )
    tokens = arrays.get(name.removesuffix('_peak') + '_tokens')
    if name.endswith('_peak') and tokens is not None:
      _check_peaks(name, array, tokens)
  _check_ids(arrays.get('latent_ids', np.arange(0)), first)
  if not (np.diff(arrays.get('hist_edges', np.zeros(0))) > 0).all():
    raise errors.UserError('hist_edges do not rise: run sae-probe again')


def _check_ids(ids: np.ndarray, first: int) -> None:
  """Raises UserError unless each latent has the number of its row."""
  wrong = np.flatnonzero(ids != np.arange(first, first + len(ids)))
  if len(wrong):
    raise errors.UserError(
      f'latent_ids holds latent {ids[wrong[0]]} in row {first + wrong[0]}: '
      'run sae-probe again'
    )


def _check_bounds(name: str, column: Column, array: np.ndarray) -> None:
  """Raises UserError if an entry is not one that the column can have."""
  if column.may_be_absent:
    array = array[np.isfinite(array)]
  if not array.size:
    return
  low, high = array.min(), array.max()
  # Of numbers that are not finite one is an end; nan is both.
  if not (np.isfinite(low) and np.isfinite(high)) or not (
    column.least <= low and high <= column.most
  ):
    raise errors.UserError(
      f'{name} holds numbers from {low} to {high}, which is no '
      f'{column.meaning.partition(";")[0]}: run sae-probe again'
    )


def _check_peaks(name: str, peak: np.ndarray, tokens: np.ndarray) -> None:
  """Raises UserError if an example's place is outside of its window."""
  width = tokens.shape[-1]
  if np.max(peak, initial=-1) < width:
    places = np.maximum(peak, 0)[..., None]
    at = np.take_along_axis(tokens, places, axis=-1)[..., 0]
    if ((at >= 0) | (peak < 0)).all():
      return
  raise errors.UserError(
    f'{name} names places without a token in windows of {width}: '
    'run sae-probe again'
  )
