"""Whether latents are more than single channels of the activation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import progress
from sae_jax.probing.suite import arrays
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.figures import ratio, Sample, SHARE, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = 'Latents and channels'
ABOUT = """If a latent only copies one channel of the activation, the channel
would have done. For each latent of a sample, its activation on test rows is
correlated with every channel of the raw activation, and the highest absolute
correlation is kept. It is a maximum of many, so that chance alone gives some:
beside it stands the same with the channels of another row ("shuffled rows").
Of the control whose latents are channels, where they are among the largest of
the token, most have a correlation above 0.5.

Each draw has latents and rows of its own. After Bricken et al., "Towards
monosemanticity" (2023), who compare features with the neurons they are made of;
the form is ours."""
UNIT = 'latents'
ONE_SITE = True
SHUFFLED = 'shuffled rows'


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured: latents and test rows of each draw."""

  latents: int
  rows: int
  batch_rows: int = 512


SIZES = {'quick': Size(400, 2048), 'all': Size(4000, 40_000)}
# A latent that fires on fewer rows of its draw is left out.
_LEAST_FIRINGS = 10
_COPY = 0.5

STATISTICS = {
  'correlation': Statistic(
    'nearest channel',
    'Highest absolute correlation of a latent with a single channel; mean over '
    f'the latents that fire on {_LEAST_FIRINGS} rows or more.',
    ratio('correlation', 'latents'),
    ends=SHARE,
  ),
  'copies': Statistic(
    'copies of channels',
    f'Share of these latents with one above {_COPY}.',
    ratio('copies', 'latents'),
    better='low',
    ends=SHARE,
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  drawn = context.rows(size.rows, 'neurons')
  samples = {}
  total = len(context.scored) * len(drawn.raw_BD)
  with progress.bar(total=total, unit='tok', desc='neurons') as bar:
    for name, scored in context.scored.items():
      parts = {name: []}
      if name == context.name:
        parts[SHUFFLED] = []
      n_latents = scored.shape.config.n_latents
      order = context.rng('neurons', name).permutation(n_latents)
      latents, draws = [], []
      for draw in range(context.draws):
        own = order[draw :: context.draws][: size.latents]
        raw_BD = drawn.raw_BD[drawn.draw_B == draw]
        for kind, shift in zip(parts, (0, len(raw_BD) // 2)):
          sums = _sums(context, scored, raw_BD, own, shift, size)
          parts[kind].append(_terms(sums, len(raw_BD)))
        latents.append(own)
        draws.append(np.full(len(own), draw))
        bar.update(len(raw_BD))
      for kind, of in parts.items():
        samples[kind] = Sample(
          np.concatenate(latents),
          np.concatenate(draws),
          {t: np.concatenate([part[t] for part in of]) for t in of[0]},
        )
  if not samples[context.name].sums['latents'].any():
    raise CannotMeasure(
      f'no latent of the sample fires on {_LEAST_FIRINGS} of its rows: harvest '
      'more text, or take --suite=neurons'
    )
  return Outcome(samples)


def _sums(context, scored, raw_BD, latents, shift, size) -> list[np.ndarray]:
  """Sums of products of latents and channels, of some rows.

  The channels are those of the row that is `shift` rows further, less the mean
  activation, so that no difference cancels.
  """
  shape, sae = scored
  # The place of each latent in the sample; past the end of it for none.
  place_N = np.full(shape.config.n_latents, len(latents), np.int32)
  place_N[latents] = np.arange(len(latents))
  channels_BD = np.roll(raw_BD, -shift, 0) - context.mean_D.astype(np.float32)
  total, mesh = None, context.mesh
  put = functools.partial(arrays.on_data, size=size.batch_rows, mesh=mesh)
  n_rows = size.batch_rows + -size.batch_rows % mesh.shape['data']
  for start, stop in arrays.batches(size.batch_rows, len(raw_BD), mesh):
    # Rows that fill up a batch count nothing.
    counts_B = (np.arange(n_rows) < stop - start).astype(np.float32)
    out = _products(
      shape,
      len(latents),
      sae,
      place_N,
      put(raw_BD[start:stop]),
      put(channels_BD[start:stop]),
      put(counts_B),
    )
    out = [arrays.to_host(of).astype(np.float64) for of in out]
    total = out if total is None else list(map(np.add, total, out))
  return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _products(shape, count, sae, place_N, raw_BD, channels_BD, counts_B):
  vals_BK, idx_BK = scored_lib.codes(shape, sae, raw_BD)
  vals_BK = jnp.where(vals_BK > 0, vals_BK, 0) * counts_B[:, None]
  rows_B1 = jnp.arange(len(vals_BK))[:, None]
  a_BN = jnp.zeros((len(vals_BK), count), vals_BK.dtype)
  a_BN = a_BN.at[rows_B1, place_N[idx_BK]].add(vals_BK, mode='drop')
  channels_BD = channels_BD * counts_B[:, None]
  product_ND = jnp.matmul(
    a_BN.T, channels_BD, precision=jax.lax.Precision.HIGHEST
  )
  out = (
    product_ND,
    a_BN.sum(0),
    (a_BN**2).sum(0),
    (a_BN > 0).sum(0),
    channels_BD.sum(0),
    (channels_BD**2).sum(0),
  )
  return arrays.whole(out, shape.mesh)


def _terms(sums: list[np.ndarray], rows: int) -> dict[str, np.ndarray]:
  """What each latent adds."""
  product_ND, a_N, square_N, fires_N, x_D, square_D = sums
  covariance_ND = product_ND / rows - np.outer(a_N, x_D) / rows**2
  of_latent_N = np.maximum(square_N / rows - (a_N / rows) ** 2, 0)
  of_channel_D = np.maximum(square_D / rows - (x_D / rows) ** 2, 0)
  scale_ND = np.sqrt(np.outer(of_latent_N, of_channel_D))
  correlation_ND = np.divide(
    np.abs(covariance_ND),
    scale_ND,
    out=np.zeros_like(scale_ND),
    where=scale_ND > 0,
  )
  counts_N = fires_N >= _LEAST_FIRINGS
  best_N = np.where(counts_N, correlation_ND.max(1), 0)
  return {
    'correlation': best_N,
    'copies': (best_N > _COPY).astype(np.float64),
    'latents': counts_N.astype(np.float64),
  }
