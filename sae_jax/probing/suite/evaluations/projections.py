"""Decoder projections, which choose k without labels."""

import dataclasses
import functools

import jax
import numpy as np

from sae_jax import autoencoder
from sae_jax.probing.suite import arrays
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import ratio, Sample, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = 'Decoder projections (choosing k)'
ABOUT = """All test rows, less the decoder bias, are projected on all decoder
rows, and the projections of all tokens are put in order: the figure is the one
that n of a token exceed on average. An autoencoder with too few or too many
active latents a token mixes features that occur together, and its decoder rows
then have something in common with tokens that they have nothing to do with:
far down the order its projections are higher. Of autoencoders that differ in k
alone the one with the lowest curve has the best k.

Units are draws of test rows. Chanin and Garriga-Alonso, "Sparse but wrong"
(2025), who take n to be half of the latents."""
UNIT = 'draws'


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured; rows of each draw, and most latents."""

  rows: int
  latents: int = 16_384
  batch_rows: int = 512


SIZES = {'quick': Size(512), 'all': Size(4096)}
_SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)

STATISTICS = {
  'middle': Statistic(
    'middle projection',
    'The projection that half of all latents exceed on average.',
    ratio('middle', 'draws'),
    better='low',
  ),
  'projection': Statistic(
    'projection by n',
    'The projection that this share of all latents exceeds on average.',
    ratio('projection', 'draws_points'),
    better='low',
    points='share of latents',
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  drawn = context.rows(size.rows, 'projections')
  samples = {}
  for name, (shape, sae) in context.scored.items():
    # The same share of a part of the latents says the same of all.
    n_latents = shape.config.n_latents
    count = min(n_latents, size.latents)
    rng = context.rng('projections', name)
    latents = np.sort(rng.permutation(n_latents)[:count]).astype(np.int32)
    values = []
    for draw in range(context.draws):
      raw_BD = drawn.raw_BD[drawn.draw_B == draw]
      parts = []
      for start, stop in arrays.batches(
        size.batch_rows, len(raw_BD), context.mesh
      ):
        part = arrays.on_data(raw_BD[start:stop], size.batch_rows, context.mesh)
        out = _projections(shape, sae, part, latents)
        parts.append(arrays.to_host(out, stop - start))
      order = -np.sort(-np.concatenate(parts), axis=None)
      places = [int(share * count) * len(raw_BD) for share in _SHARES]
      values.append(order[np.minimum(places, len(order) - 1)])
    values = np.array(values, np.float64)
    draws = np.arange(context.draws)
    samples[name] = Sample(
      draws,
      draws,
      {
        'middle': values[:, -1],
        'projection': values,
        'draws': np.ones(len(draws)),
        'draws_points': np.ones_like(values),
      },
    )
  return Outcome(samples, {'share of latents': np.array(_SHARES)})


@functools.partial(jax.jit, static_argnums=0)
def _projections(shape, sae, raw_BD, latents):
  x_BD, _ = autoencoder.preprocess(shape.config, sae, raw_BD)
  rows_CD = scored_lib.rows(shape, sae.w_dec_ND, latents)
  out_BC = (x_BD - sae.b_pre_D) @ rows_CD.T
  return arrays.whole(out_BC, shape.mesh)
