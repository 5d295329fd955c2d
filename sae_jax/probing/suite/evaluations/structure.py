"""How directions lie to each other, and what other runs have in common."""

import dataclasses
import functools

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from sae_jax.probing import neighbours
from sae_jax.probing.suite import arrays, controls, meta
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import (
  divided,
  ratio,
  Sample,
  SHARE,
  Statistic,
)
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
arXiv 2505.20254 for PW-MCC. Of two that differ in their number of latents it is
counted how many latents of the larger one a latent of the smaller one has
become: those whose nearest row in the smaller one it is, with a cosine above
0.7. Bricken et al., "Towards monosemanticity" (2023), call it splitting.

Whether rows are made of fewer other directions is what a small autoencoder of
the rows says: a quarter as many latents, four of them active for a row. What it
reconstructs of rows at random says how much is chance. SAEBench 0.6,
meta_structure, after Bussmann et al. (2024); the training is our own, so that
figures are not those of its tables."""
UNIT = 'latents'


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    matched: most latents of two autoencoders that are matched one to one: the
      matching takes time with the third power of their number.
    meta_rows: most rows that the small autoencoder is trained on.
    meta_steps: of its training.
    split: most latents of two autoencoders of unequal size that are compared.
  """

  matched: int
  meta_rows: int = 1024
  meta_steps: int = 400
  meta_batch: int = 256
  split: int = 16_384


SIZES = {
  'quick': Size(4096),
  'all': Size(16_384, 16_384, 1500, 512, 131_072),
}
_SHARED = 0.7
# Rows of the larger of two autoencoders that are compared at a time.
_BLOCK = 2048

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
    ends=SHARE,
  ),
  'encoder_decoder': Statistic(
    'encoder with decoder',
    'Cosine of the encoder row with the decoder row; mean over latents.',
    ratio('encoder_decoder', 'latents'),
  ),
  'meta': Statistic(
    'explained by fewer',
    'Share of the variance of decoder rows, at unit length, that an '
    'autoencoder with a quarter as many latents reconstructs, of four for a '
    'row.',
    lambda sums: 1 - divided(sums['meta_left'], sums['meta_total']),
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
    ends=SHARE,
  ),
  'pieces': Statistic(
    'pieces of a latent',
    'Latents of the larger of two autoencoders for one of the smaller; mean '
    'over those of the smaller.',
    ratio('pieces', 'splitting'),
  ),
  'no_piece': Statistic(
    'lost latents',
    "Share of the smaller one's latents that none of the larger one's has come "
    'of.',
    ratio('no_piece', 'splitting'),
    ends=SHARE,
  ),
  'one_piece': Statistic(
    'whole latents',
    'Share that has become one.',
    ratio('one_piece', 'splitting'),
    ends=SHARE,
  ),
  'more_pieces': Statistic(
    'split latents',
    'Share that has become two or more.',
    ratio('more_pieces', 'splitting'),
    ends=SHARE,
  ),
}
_COMPARED = ('best', 'compared', 'matched', 'pairs', 'shared')
_SPLIT = ('pieces', 'no_piece', 'one_piece', 'more_pieces', 'splitting')


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
    terms |= {term: np.zeros(n_latents) for term in (*_COMPARED, *_SPLIT)}
    terms |= _meta(context, name, size)
    if name not in (context.name, *controls.DEFINITIONS):
      terms |= _compared(itself, (shape, sae), size, name, remarks)
      terms = _with_splitting(
        terms, _splitting(itself, (shape, sae), size, name, remarks)
      )
    count = len(terms['latents'])
    samples[name] = Sample(
      np.arange(count),
      context.rng('structure').integers(0, context.draws, count),
      {term: np.asarray(of, np.float64) for term, of in terms.items()},
    )
  if len(samples) == len(set(samples) & {context.name, *controls.DEFINITIONS}):
    remarks.append(
      'No other run is given as a control (--controls): MMCS, PW-MCC and '
      'shared latents compare two runs, such as two seeds, and pieces of '
      'latents two of unequal size.'
    )
  return Outcome(samples, remarks=tuple(remarks))


def _meta(context: Context, name: str, size: Size) -> dict[str, np.ndarray]:
  """What a small autoencoder of some of the rows leaves of each."""
  shape, sae = context.scored[name]
  n_latents = shape.config.n_latents
  rng = context.rng('structure', 'meta')
  latents = np.sort(rng.permutation(n_latents)[: size.meta_rows])
  rows_ND = arrays.to_host(_rows(shape, sae, latents.astype(np.int32)))
  terms = {}
  for term, of in zip(
    ('meta_left', 'meta_total'),
    meta.left(rows_ND, size.meta_steps, size.meta_batch, rng),
  ):
    terms[term] = np.zeros(n_latents)
    terms[term][latents] = of
  return terms


@functools.partial(jax.jit, static_argnums=0)
def _rows(shape, sae, latents):
  return arrays.whole(scored_lib.rows(shape, sae.w_dec_ND, latents), shape.mesh)


def _splitting(itself, other, size: Size, name: str, remarks: list[str]):
  """What each latent of the smaller of two autoencoders adds."""
  smaller, larger = sorted((itself, other), key=_n_latents)
  if _n_latents(smaller) == _n_latents(larger):
    return {}
  if _n_latents(larger) > size.split:
    line = (
      f'{name} is not compared for splitting: {_n_latents(larger):,} latents '
      f'are more than the {size.split:,} that are compared at this size.'
    )
    logging.warning('%s', line)
    remarks.append(line)
    return {}
  small_ND, large_ND = (
    _unit(arrays.fetched(sae.w_dec_ND, shape.mesh))
    for shape, sae in (smaller, larger)
  )
  pieces_N = np.zeros(len(small_ND))
  for start in range(0, len(large_ND), _BLOCK):
    cosines_BN = large_ND[start : start + _BLOCK] @ small_ND.T
    near_B = cosines_BN.max(1) > _SHARED
    np.add.at(pieces_N, cosines_BN.argmax(1)[near_B], 1)
  return {
    'pieces': pieces_N,
    'no_piece': pieces_N == 0,
    'one_piece': pieces_N == 1,
    'more_pieces': pieces_N > 1,
    'splitting': np.ones(len(pieces_N)),
  }


def _n_latents(scored) -> int:
  return scored[0].config.n_latents


def _with_splitting(terms, splitting):
  """Terms of another's latents, and behind them those of the smaller one's."""
  if not splitting:
    return terms
  behind = np.zeros(len(splitting['splitting']))
  return {
    term: np.concatenate([of, splitting.get(term, behind)])
    for term, of in terms.items()
  }


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
