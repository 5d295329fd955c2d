"""Dark matter: how much of the error is linear in the activation."""

import dataclasses
import functools

import jax
import numpy as np

from sae_jax import autoencoder, progress
from sae_jax.probing import splicing
from sae_jax.probing.suite import arrays
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import divided, ratio, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = 'What the error is made of'
ABOUT = """An autoencoder's error is the activation less its reconstruction.
Here it is predicted from the activation itself by linear regression, fitted on
training rows. What can be predicted so is, as far as a line can tell, made of
features that the autoencoder lacks or reads too weakly; the rest, the nonlinear
error, is not explained by missing features alone. The squared length of the
error is predicted in the same way.

Shares are of test rows. Engels et al., "Decomposing the dark matter of sparse
autoencoders" (2024)."""
UNIT = 'documents'


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured: rows for the fit, and test rows of each draw."""

  fitted_rows: int
  rows: int
  batch_rows: int = 1024


SIZES = {'quick': Size(20_000, 1024), 'all': Size(200_000, 20_000)}
# Of the mean variance of the inputs: keeps directions that hardly vary out.
_RIDGE = 1e-4

STATISTICS = {
  'linear': Statistic(
    'error linear in x',
    'Share of the variance of the error that a linear function of the '
    'activation predicts.',
    lambda sums: 1 - divided(sums['left'], sums['error']),
  ),
  'nonlinear_fvu': Statistic(
    'nonlinear FVU',
    'Fraction of variance unexplained that is not linear in the activation.',
    ratio('left', 'total'),
    better='low',
    orders=True,
  ),
  'length': Statistic(
    'length of the error',
    'Share of the variance of its squared length that a linear function of the '
    'activation predicts.',
    lambda sums: 1 - divided(sums['length_left'], _variance(sums, 'length')),
  ),
}


def _variance(sums, name):
  """Sum of squares about the mean."""
  return sums[f'{name}_square'] - divided(sums[name] ** 2, sums['rows'])


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  fits = {name: _fit(context, name, size) for name in context.scored}
  means = {name: context.mean(name) for name in context.scored}
  drawn = context.rows(size.rows)
  samples = context.sums_of_rows(
    drawn,
    size.batch_rows,
    lambda name, scored, raw_BD: _terms(
      *scored, raw_BD, *fits[name], means[name]
    ),
    'error',
  )
  return Outcome(samples)


def _fit(context: Context, name: str, size: Size) -> tuple[np.ndarray, ...]:
  """Means and the linear map of x to the error and its squared length.

  Ridge regression in float64 on training rows, from their second moments.
  """
  shape, sae = context.scored[name]
  n_rows = min(size.fitted_rows, context.store.n_train)
  d_model = shape.config.d_model
  moments = np.zeros((2 * d_model + 2, 2 * d_model + 2))
  with progress.bar(total=n_rows, unit='tok', desc=f'error: {name}') as bar:
    for start, stop in arrays.batches(size.batch_rows, n_rows, context.mesh):
      raw_BD = arrays.on_data(
        context.store.finite_rows(start, stop), size.batch_rows, context.mesh
      )
      x_BD, error_BD, _ = (
        arrays.to_host(of, stop - start).astype(np.float64)
        for of in _errors(shape, sae, raw_BD)
      )
      length_B1 = (error_BD**2).sum(1, keepdims=True)
      all_BX = np.concatenate(
        [np.ones_like(length_B1), x_BD, error_BD, length_B1], 1
      )
      moments += all_BX.T @ all_BX
      bar.update(stop - start)
  moments /= n_rows
  mean = moments[0].copy()
  moments -= np.outer(mean, mean)
  inputs, outputs = slice(1, d_model + 1), slice(d_model + 1, None)
  square = moments[inputs, inputs]
  ridge = _RIDGE * np.trace(square) / d_model
  weights = np.linalg.solve(
    square + ridge * np.eye(d_model), moments[inputs, outputs]
  )
  return tuple(
    of.astype(np.float32) for of in (mean[inputs], mean[outputs], weights)
  )


@functools.partial(jax.jit, static_argnums=0)
def _errors(shape, sae, raw_BD):
  """What is read, what of it or of a target is missed, and the latter."""
  tokens_BX, back = autoencoder.tokens(shape.config, sae, raw_BD)
  x_BD, target_BD = autoencoder.halves(shape.config, tokens_BX)
  new_BD = splicing.reconstruction(shape.config, shape.mesh)(sae, raw_BD)
  error_BD = target_BD - (new_BD - back.shift) / back.scale
  return arrays.whole((x_BD, error_BD, target_BD), shape.mesh)


@functools.partial(jax.jit, static_argnums=0)
def _terms(shape, sae, raw_BD, mean_D, mean_out, weights, target_mean_D):
  x_BD, error_BD, target_BD = _errors(shape, sae, raw_BD)
  predicted = (x_BD - mean_D) @ weights + mean_out
  length_B = (error_BD**2).sum(1)
  terms = {
    'error': ((error_BD - mean_out[:-1]) ** 2).sum(1),
    'left': ((error_BD - predicted[:, :-1]) ** 2).sum(1),
    'total': ((target_BD - target_mean_D) ** 2).sum(1),
    'length': length_B,
    'length_square': length_B**2,
    'length_left': (length_B - predicted[:, -1]) ** 2,
    'rows': jax.numpy.ones_like(length_B),
  }
  return arrays.whole(terms, shape.mesh)
