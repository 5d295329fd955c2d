"""How directions lie to each other, and what other runs have in common."""

import dataclasses

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from sae_jax.probing import neighbours
from sae_jax.probing.suite import arrays, controls
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import ratio, Sample, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = 'Structure of the dictionary'
ABOUT = """Decoder rows are the directions that latents stand for. How close the
nearest other row is shows latents that split one direction among them; how far
encoder and decoder of a latent agree shows whether it reads what it writes.

Other autoencoders that are given as controls, such as the same with another
seed, are compared row by row: the highest cosine of each of their rows with one
of this autoencoder's (MMCS, which always finds something, and is high by chance
in few dimensions), and the mean cosine of the best one-to-one matching (PW-MCC,
Hungarian algorithm). A latent is shared if decoders and encoders, matched each
by itself, name the same partner with cosines above 0.7. Paulo and Belrose,
"Sparse autoencoders trained on the same data learn different features" (2025);
arXiv 2505.20254 for PW-MCC."""
UNIT = 'latents'


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    matched: most latents of two autoencoders that are matched one to one: the
      matching takes time with the third power of their number.
  """

  matched: int


SIZES = {'quick': Size(4096), 'all': Size(16_384)}
_SHARED = 0.7

STATISTICS = {
  'nearest': Statistic(
    'nearest row',
    'Cosine of a decoder row with the nearest other one; mean over latents.',
    ratio('nearest', 'latents'),
  ),
  'duplicates': Statistic(
    'near duplicates',
    'Share of the latents whose nearest other row has a cosine above 0.9.',
    ratio('duplicates', 'latents'),
    better='low',
  ),
  'encoder_decoder': Statistic(
    'encoder with decoder',
    'Cosine of the encoder row with the decoder row; mean over latents.',
    ratio('encoder_decoder', 'latents'),
  ),
  'mmcs': Statistic(
    'MMCS',
    "Highest cosine of another autoencoder's row with one of this one's; mean "
    "over the other's latents.",
    ratio('best', 'compared'),
  ),
  'pw_mcc': Statistic(
    'PW-MCC',
    'Cosine with the partner in the best one-to-one matching of decoder rows; '
    'mean over the pairs.',
    ratio('matched', 'pairs'),
  ),
  'shared': Statistic(
    'shared latents',
    'Share of the pairs whose decoders and encoders, matched each by itself, '
    'are the same pair with both cosines above 0.7.',
    ratio('shared', 'pairs'),
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  itself, remarks = context.itself, []
  samples = {}
  for name, (shape, sae) in context.scored.items():
    n_latents = shape.config.n_latents
    count = min(1, n_latents - 1)
    nearest = neighbours.nearest(sae.w_dec_ND, count).cosines_NC
    nearest_N = (
      arrays.fetched(nearest, shape.mesh)
      .reshape(n_latents, -1)
      .max(1, initial=-1)
    )
    terms = {
      'nearest': nearest_N,
      'duplicates': nearest_N > 0.9,
      'encoder_decoder': arrays.fetched(
        _cosines(sae.w_enc_ND, sae.w_dec_ND), shape.mesh
      ),
      'latents': np.ones(n_latents),
    }
    others = dict.fromkeys(('best', 'compared', 'matched', 'pairs', 'shared'))
    terms |= {term: np.zeros(n_latents) for term in others}
    if name not in (context.name, *controls.DEFINITIONS):
      terms |= _compared(itself, (shape, sae), size, name, remarks)
    samples[name] = Sample(
      np.arange(n_latents),
      context.rng('structure').integers(0, context.draws, n_latents),
      {term: np.asarray(of, np.float64) for term, of in terms.items()},
    )
  if len(samples) == len(set(samples) & {context.name, *controls.DEFINITIONS}):
    remarks.append(
      'No other run is given as a control (--controls): MMCS, PW-MCC and '
      'shared latents compare two runs, such as two seeds.'
    )
  return Outcome(samples, remarks=tuple(remarks))


def _compared(itself, other, size: Size, name: str, remarks: list[str]):
  """What each latent of another autoencoder adds, as far as it is compared."""
  (shape, sae), (other_shape, other_sae) = itself, other
  n_own, n_other = shape.config.n_latents, other_shape.config.n_latents
  if max(n_own, n_other) > size.matched:
    line = (
      f'{name} is not compared row by row: {max(n_own, n_other):,} latents are '
      f'more than the {size.matched:,} that are matched at this size.'
    )
    logging.warning('%s', line)
    remarks.append(line)
    return {}
  decoders, encoders = (
    _unit(arrays.fetched(of, other_shape.mesh))
    @ _unit(arrays.fetched(own, shape.mesh)).T
    for of, own in (
      (other_sae.w_dec_ND, sae.w_dec_ND),
      (other_sae.w_enc_ND, sae.w_enc_ND),
    )
  )
  rows, partners = optimize.linear_sum_assignment(decoders, maximize=True)
  encoder_rows, encoder_partners = optimize.linear_sum_assignment(
    encoders, maximize=True
  )
  by_encoder = np.full(n_other, -1)
  by_encoder[encoder_rows] = encoder_partners
  matched, pairs, shared = (np.zeros(n_other) for _ in range(3))
  matched[rows] = decoders[rows, partners]
  pairs[rows] = 1
  shared[rows] = (
    (by_encoder[rows] == partners)
    & (decoders[rows, partners] > _SHARED)
    & (encoders[rows, partners] > _SHARED)
  )
  return {
    'best': decoders.max(1),
    'compared': np.ones(n_other),
    'matched': matched,
    'pairs': pairs,
    'shared': shared,
  }


def _unit(rows_ND: np.ndarray) -> np.ndarray:
  lengths_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
  return rows_ND / np.where(lengths_N1 > 0, lengths_N1, 1)


@jax.jit
def _cosines(a_ND, b_ND):
  """Cosines of rows; 0 where one is zero."""
  norms_N = jnp.linalg.norm(a_ND, axis=1) * jnp.linalg.norm(b_ND, axis=1)
  return (a_ND * b_ND).sum(1) / jnp.where(norms_N > 0, norms_N, 1)
