"""Reconstruction of a store's rows, by the autoencoder and by controls."""

from collections.abc import Iterator
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, errors, progress
from sae_jax import store as store_lib
from sae_jax.autoencoder import metrics
from sae_jax.checkpoint import Trained
from sae_jax.probing import baselines

# Far more rows than directions: with more, components no longer change.
_PCA_ROWS = 1_000_000


@functools.partial(jax.jit, static_argnums=0)
def _sums(config, sae, raw_BD):
  return metrics.evaluate_batch(config, sae, raw_BD)


@functools.partial(jax.jit, static_argnums=0)
def _preprocessed(config, sae, raw_BD):
  return autoencoder.preprocess(config, sae, raw_BD)[0]


def batches(
  store: store_lib.Store, start: int, stop: int, batch_rows: int
) -> Iterator[np.ndarray]:
  """Rows start to stop as raw_BD of at most batch_rows, in order.

  Raises:
    UserError: if a row is not finite.
  """
  for row in range(start, stop, batch_rows):
    yield store.finite_rows(row, min(stop, row + batch_rows))


def measure(
  trained: Trained,
  store: store_lib.Store,
  start: int,
  stop: int,
  batch_rows: int,
  desc: str,
) -> metrics.Metrics:
  """Metrics of an autoencoder on rows of a store.

  Args:
    trained: the autoencoder, with its config and the constant of NMSE.
    store: the activations.
    start: first row.
    stop: one past the last row.
    batch_rows: rows at a time.
    desc: label of the progress bar.

  Raises:
    UserError: if a row is not finite, or the rows do not vary.
  """
  total = None
  with progress.bar(total=stop - start, unit='tok', desc=desc) as bar:
    for raw_BD in batches(store, start, stop, batch_rows):
      sums = _sums(trained.config, trained.sae, raw_BD)
      total = metrics.add_sums(total, sums)
      bar.update(len(raw_BD))
  result = metrics.summarise(total, trained.mse_of_mean)
  if math.isnan(result.fvu):
    raise errors.UserError(
      f'rows {start} to {stop} of store {store.url} differ by no more than '
      'rounding, or their reconstructions are not finite: they have no FVU; '
      'use another store'
    )
  return result


def untrained(
  config: autoencoder.SaeConfig, sample_BD: np.ndarray, seed: int
) -> Trained:
  """A control: a fresh random autoencoder fitted to the inputs, untrained.

  Also where training starts from rows of the data, which know much already.

  Args:
    config: the trained one's config.
    sample_BD: raw training activations.
    seed: seed of its weights.
  """

  config = dataclasses.replace(
    config, decoder_init='random', encoder_gain='norm'
  )

  @jax.jit
  def make(key, sample_BD):
    sae = autoencoder.init_weights(config, key)
    return autoencoder.fit_inputs(config, sae, sample_BD)

  sae, mse_of_mean = make(jax.random.key(seed), jnp.asarray(sample_BD))
  return Trained(config, sae, float(mse_of_mean), step=0)


def pca_components(l0: float, store: store_lib.Store) -> int:
  """As many numbers as a token has active latents, on average.

  Args:
    l0: mean number of active latents.
    store: no more than its rows span.
  """
  spanned = min(store.manifest.d_model, min(store.n_train, _PCA_ROWS) - 1)
  return max(1, min(round(l0), spanned))


def pca_fvu(
  trained: Trained,
  store: store_lib.Store,
  start: int,
  stop: int,
  n_components: int,
  batch_rows: int,
) -> float:
  """FVU of the best linear code with n_components numbers per token.

  Principal components are fitted on the first million training rows and
  applied to the given ones, after the autoencoder's own preprocessing.

  Args:
    trained: the autoencoder, whose preprocessing is applied.
    store: the activations.
    start: first row that is scored.
    stop: one past the last.
    n_components: how many components are kept, `pca_components` for as many
      numbers per token as the autoencoder has.
    batch_rows: rows at a time.
  """

  def rows(start, stop):
    for raw_BD in batches(store, start, stop, batch_rows):
      yield np.asarray(_preprocessed(trained.config, trained.sae, raw_BD))

  pca = baselines.fit_pca(rows(0, min(store.n_train, _PCA_ROWS)), n_components)
  return float(baselines.pca_fvu(pca, rows(start, stop))[-1])
