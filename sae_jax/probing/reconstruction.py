"""Reconstruction of a store's rows, and an autoencoder that knows nothing."""

from collections.abc import Iterator
import dataclasses
import functools
import math

import jax
from jax.sharding import PartitionSpec
import numpy as np

from sae_jax import autoencoder, errors, progress
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax.autoencoder import metrics
from sae_jax.checkpoint import Trained

# Far more rows than directions: with more, components no longer change.
_PCA_ROWS = 1_000_000


@functools.partial(jax.jit, static_argnums=0)
def _sums(config, sae, raw_BD):
  return metrics.evaluate_batch(config, sae, raw_BD)


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
  config: autoencoder.SaeConfig,
  sample_BD: np.ndarray,
  seed: int,
  mesh: jax.sharding.Mesh | None = None,
) -> Trained:
  """A control: a fresh random autoencoder fitted to the inputs, untrained.

  Also where training starts from rows of the data, which know much already.

  Args:
    config: the trained one's config.
    sample_BD: raw training activations.
    seed: seed of its weights.
    mesh: where it is made; None for one device. Its values do not depend on it.
  """
  config = dataclasses.replace(
    config, decoder_init='random', encoder_gain='norm'
  )
  mesh = mesh or mesh_lib.one_device()

  def weights():
    return autoencoder.init_weights(config, jax.random.key(seed))

  shapes = jax.eval_shape(weights)
  shardings = mesh_lib.shardings(shapes, mesh)
  none = PartitionSpec()
  fit = jax.jit(
    jax.shard_map(
      lambda sae, sample_BD: autoencoder.fit_inputs(
        config, sae, sample_BD, axis='latent'
      ),
      mesh=mesh,
      in_specs=(mesh_lib.specs(shapes), none),
      out_specs=(mesh_lib.specs(shapes), none),
    ),
    out_shardings=(shardings, mesh_lib.sharding(mesh, '')),
  )
  sae, mse_of_mean = fit(jax.jit(weights, out_shardings=shardings)(), sample_BD)
  return Trained(config, sae, float(mse_of_mean), step=0)


def pca_components(l0: float, store: store_lib.Text) -> int:
  """As many numbers as a token has active latents, on average.

  Args:
    l0: mean number of active latents.
    store: no more than its rows span.
  """
  spanned = min(store.manifest.d_model, min(store.n_train, _PCA_ROWS) - 1)
  return max(1, min(round(l0), spanned))
