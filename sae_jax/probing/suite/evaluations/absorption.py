"""Whether latents of words have taken over the latent of their first letter."""

import dataclasses
import functools
import hashlib
from typing import NamedTuple

import jax
import numpy as np

from sae_jax import autoencoder, progress
from sae_jax.probing.suite import (
  ablating,
  absorbed,
  arrays,
  letters,
  linear_probes,
)
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.figures import ratio, Sample, SHARE, Statistic
from sae_jax.probing.suite.outcome import Outcome
from sae_jax.subject import capture
from sae_jax.subject.formats import tokenizer as tokenizer_lib

TITLE = 'Absorption of first letters'
ABOUT = f"""A sparse autoencoder is rewarded for giving a word a latent that
stands for its first letter too, and for leaving the letter's own latent silent
there. Then the letter's latent has holes that nobody sees. Here the subject
reads words of its vocabulary, each after {letters.EXAMPLES} answered examples,
as in "{{word}} has the first letter:". Linear probes on the activation of the
word say which letters the subject knows there; a letter's own latents are those
that together tell it best, as long as each raises the F1 by 0.03.

Of every test word whose letter the probe tells right it is asked what share of
the letter's direction other latents hold in place of the letter's own: the
fraction; and whether one other latent holds it while all of the letter's own
are silent: full absorption. Letters whose probes have an F1 of 0.6 or less are
left out, and with fewer than 20 letters nothing is said. The five draws leave
out a fifth of the words each for the test. An autoencoder without latents of
letters absorbs nothing: read it beside the F1 of its latents.

Definitions and limits are those of SAEBench 0.6 (Karvonen et al. 2025), after
Chanin et al., "A is for absorption" (2024). Examples are drawn by the seed;
decoder rows may have any length; activations are those that the autoencoder
reads, after its preprocessing; fewer words than the vocabulary has are drawn
evenly over the letters; and the probes are the optimum of SAEBench's loss,
which its 100 epochs of Adam come near to on tens of thousands of words, and do
not on a few thousand."""
UNIT = 'letters'
ONE_SITE = True


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    words: that the subject reads, a fifth of which each draw tests.
    steps: of Adam, for the probes that rank latents.
  """

  words: int
  steps: int = 250
  batch_words: int = 16
  batch_rows: int = 512


SIZES = {'quick': Size(1560), 'all': Size(50_000)}
_LEAST_F1, _LEAST_LETTERS = 0.6, 20
_MOST_LATENTS, _LEAST_GAIN, _L1 = 10, 0.03, 0.01
# Fewer words of a letter are in no draw's test.
_LEAST_WORDS = 10
# Decoder rows that are fetched at a time.
_ROWS = 8192
_N_LETTERS = len(letters.LETTERS)

STATISTICS = {
  'fraction': Statistic(
    'absorption',
    "Share of the letter's direction that other latents hold in place of the "
    "letter's own; mean over the words of a letter whose probe tells it right, "
    'then over letters.',
    ratio('fraction', 'letters'),
    better='low',
    ends=SHARE,
  ),
  'full': Statistic(
    'full absorption',
    "Share of these words on which the letter's own latents are silent and one "
    'other latent holds 0.4 of the direction or more; mean over letters.',
    ratio('full', 'letters'),
    better='low',
    ends=SHARE,
  ),
  'latents': Statistic(
    'latents of a letter',
    'Latents that stand for a letter together: how far it is split; mean over '
    'letters.',
    ratio('latents', 'letters'),
  ),
  'latents_f1': Statistic(
    'F1 of these latents',
    'F1 of logistic regression on these latents for the letter on test words; '
    'mean over letters.',
    ratio('latents_f1', 'letters'),
    better='high',
    ends=SHARE,
  ),
  'probe_f1': Statistic(
    'F1 of the probes',
    'F1 of the linear probes on the whole activation, for the letters that are '
    'kept: what could be told.',
    ratio('probe_f1', 'letters'),
    ends=SHARE,
  ),
}


class Words(NamedTuple):
  """Words and what the subject makes of them.

  Attributes:
    raw_WD: activations.
    labels_WL: whether each letter is the first of the word.
    draw_W: the draw that tests the word.
  """

  raw_WD: np.ndarray
  labels_WL: np.ndarray
  draw_W: np.ndarray


class Probes(NamedTuple):
  """The letters' probes of each draw, G draws.

  Attributes:
    direction_GDL: unit vectors.
    predicted_WL: what the draw that tests a word says of it.
    kept_L: letters that are told well enough.
    f1_GL: on each draw's test words.
  """

  direction_GDL: np.ndarray
  predicted_WL: np.ndarray
  kept_L: np.ndarray
  f1_GL: np.ndarray


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  words = _read(context, size)
  probes, samples, remarks, table = {}, {}, [], []
  for name, scored in context.scored.items():
    z_WD, unit = _inputs(context, scored, words, size)
    # Of autoencoders with one preprocessing they are the same.
    key = hashlib.sha256(np.ascontiguousarray(z_WD)).digest()
    if key not in probes:
      probes[key] = _probes(context, words, z_WD)
    own = probes[key]
    count = int(own.kept_L.sum())
    if count < _LEAST_LETTERS:
      line = _too_few(own, words)
      if name == context.name:
        raise CannotMeasure(line)
      remarks.append(f'{name} is left out: {line}.')
      continue
    sums = _sums(context, name, scored, words, own, z_WD, unit, size)
    draws, numbers = np.divmod(np.arange(sums['letters'].size), _N_LETTERS)
    samples[name] = Sample(
      numbers, draws, {term: of.reshape(-1) for term, of in sums.items()}
    )
    if name == context.name:
      table = _table(sums, words)
      remarks.append(
        f'{len(words.draw_W):,} words; the probes of {count} letters have an '
        f'F1 above {_LEAST_F1}.'
      )
  return Outcome(samples, remarks=tuple(remarks), tables={'Letters': table})


def _too_few(probes: Probes, words: Words) -> str:
  """Why nothing is said."""
  f1_L = linear_probes.f1(probes.predicted_WL, words.labels_WL)
  return (
    f'cannot evaluate: the linear probes of {int(probes.kept_L.sum())} of '
    f'{len(letters.LETTERS)} letters have an F1 above {_LEAST_F1} on test '
    f'words, {_LEAST_LETTERS} are the fewest (mean F1 {f1_L.mean():.2f}, '
    f'{f1_L.min():.2f} to {f1_L.max():.2f}, {len(words.draw_W):,} words): '
    'small subjects do not know how words are spelled: take one of 1B '
    'parameters or more, or more words (--suite=absorption)'
  )


def _read(context: Context, size: Size) -> Words:
  """The words that are drawn, read by the subject."""
  tokenizer = context.subject.tokenizer
  known = letters.words(tokenizer)
  if len(known) < _LEAST_WORDS * _LEAST_LETTERS:
    raise CannotMeasure(
      f'{len(known)} tokens of the subject are words of letters alone, '
      f'{_LEAST_WORDS * _LEAST_LETTERS} are the fewest: take a subject whose '
      'vocabulary has words'
    )
  rng = context.rng('absorption')
  asked = letters.drawn(known, size.words, rng)
  start = tokenizer_lib.context_start(tokenizer, context.store.manifest.bos)
  prompts = letters.prompts(
    tokenizer, asked, known, [] if start is None else [start], rng
  )
  parts, total = [], len(asked)
  with progress.bar(total=total, unit='word', desc='absorption') as bar:
    for first, stop in arrays.batches(size.batch_words, total, context.mesh):
      tokens_BT, at_B = (
        arrays.on_data(of[first:stop], size.batch_words, context.mesh)
        for of in (prompts.tokens_WT, prompts.at_W)
      )
      raw_BD = _activations(
        context.subject.config,
        context.site,
        context.mesh,
        context.params,
        tokens_BT,
        at_B,
      )
      parts.append(arrays.to_host(raw_BD, stop - first))
      bar.update(stop - first)
  numbers_L = np.arange(len(letters.LETTERS))
  labels_WL = prompts.letter_W[:, None] == numbers_L
  # Dealt out letter by letter, so that each draw has its share of rare ones.
  place_W = np.cumsum(labels_WL, 0)[np.arange(total), prompts.letter_W]
  return Words(np.concatenate(parts), labels_WL, place_W % context.draws)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _activations(config, site, mesh, params, tokens_BT, at_B):
  raw_BTD = capture.capture(config, params, tokens_BT, site)
  return arrays.whole(ablating.at_token(raw_BTD, at_B), mesh)


def _inputs(context, scored, words, size) -> tuple[np.ndarray, float]:
  """What an autoencoder reads of the words, times a unit, and the unit.

  It makes the mean square of a channel 1, so that Adam's rates and the L1
  penalty mean the same of any subject.
  """
  (x_WD,) = _by_batches(context, scored, words.raw_WD, size, _preprocessed)
  square = np.square(x_WD, dtype=np.float64).mean()
  unit = float(1 / np.sqrt(max(square, np.finfo(np.float32).tiny)))
  return x_WD * np.float32(unit), unit


def _by_batches(context, scored, raw_WD, size, of_batch) -> list[np.ndarray]:
  """What a jitted function makes of activations, some at a time."""
  parts = []
  for first, stop in arrays.batches(size.batch_rows, len(raw_WD), context.mesh):
    raw_BD = arrays.on_data(raw_WD[first:stop], size.batch_rows, context.mesh)
    out = of_batch(*scored, raw_BD)
    parts.append([arrays.to_host(of, stop - first) for of in out])
  return [np.concatenate(of) for of in zip(*parts)]


@functools.partial(jax.jit, static_argnums=0)
def _preprocessed(shape, sae, raw_BD):
  x_BD, _ = autoencoder.preprocess(shape.config, sae, raw_BD)
  return arrays.whole((x_BD,), shape.mesh)


@functools.partial(jax.jit, static_argnums=0)
def _codes(shape, sae, raw_BD):
  return arrays.whole(scored_lib.codes(shape, sae, raw_BD), shape.mesh)


def _probes(context: Context, words: Words, z_WD) -> Probes:
  """The letters' probes, fitted without the words that each draw tests."""
  directions, f1s = [], []
  predicted_WL = np.zeros(words.labels_WL.shape, bool)
  for draw in range(context.draws):
    is_test_W = words.draw_W == draw
    probe = linear_probes.dense(z_WD[~is_test_W], words.labels_WL[~is_test_W])
    predicted_WL[is_test_W] = (
      z_WD[is_test_W] @ probe.weight_XL + probe.bias_L > 0
    )
    lengths_L = np.linalg.norm(probe.weight_XL, axis=0)
    directions.append(probe.weight_XL / np.where(lengths_L > 0, lengths_L, 1))
    f1s.append(
      linear_probes.f1(predicted_WL[is_test_W], words.labels_WL[is_test_W])
    )
  kept_L = linear_probes.f1(predicted_WL, words.labels_WL) > _LEAST_F1
  kept_L &= words.labels_WL.sum(0) >= _LEAST_WORDS
  return Probes(np.stack(directions), predicted_WL, kept_L, np.stack(f1s))


def _sums(
  context, name, scored, words, probes, z_WD, unit, size
) -> dict[str, np.ndarray]:
  """What each draw and letter adds to the sums, [G, L]."""
  vals_WK, idx_WK = _by_batches(context, scored, words.raw_WD, size, _codes)
  vals_WK = np.where(vals_WK > 0, vals_WK * unit, 0).astype(np.float32)
  # Those that fire on no word are nothing to any probe.
  latents = np.unique(idx_WK[vals_WK > 0])
  if not len(latents):
    latents = np.zeros(1, idx_WK.dtype)
  # Where nothing is active any place will do.
  idx_WK = np.searchsorted(latents, idx_WK).clip(max=len(latents) - 1)
  length_N, cosine_NGL = _alignment(scored, latents, probes.direction_GDL)
  codes = vals_WK, idx_WK
  kinds = ('fraction', 'full', 'latents', 'latents_f1', 'probe_f1', 'letters')
  sums = {kind: np.zeros((context.draws, _N_LETTERS)) for kind in kinds}
  sums['words'] = np.zeros((context.draws, _N_LETTERS))
  with progress.bar(
    total=context.draws, unit='draw', desc=f'absorption: {name}'
  ) as bar:
    for draw in range(context.draws):
      own = _own(context, words, codes, len(latents), draw, size)
      for letter in np.flatnonzero(probes.kept_L):
        direction_D = probes.direction_GDL[draw, :, letter].astype(np.float64)
        right_W = words.labels_WL[:, letter] & probes.predicted_WL[:, letter]
        right_W &= words.draw_W == draw
        if not right_W.any():
          continue
        fraction_W, full_W = absorbed.scores(
          vals_WK[right_W],
          idx_WK[right_W],
          cosine_NGL[:, draw, letter],
          length_N,
          z_WD[right_W] @ direction_D,
          own.inputs[letter],
        )
        of_letter = {
          'fraction': fraction_W.mean(),
          'full': full_W.mean(),
          'latents': len(own.inputs[letter]),
          'latents_f1': own.f1_L[letter],
          'probe_f1': probes.f1_GL[draw, letter],
          'letters': 1,
          'words': len(fraction_W),
        }
        for term, of in of_letter.items():
          sums[term][draw, letter] = of
      bar.update(1)
  return sums


def _alignment(scored, latents, direction_GDL):
  """Lengths of decoder rows, and their cosines with the letters' probes."""
  lengths, cosines = [], []
  for start in range(0, len(latents), _ROWS):
    rows_ND = arrays.to_host(_rows(*scored, latents[start : start + _ROWS]))
    length_N = np.linalg.norm(rows_ND.astype(np.float64), axis=1)
    unit_ND = rows_ND / np.where(length_N > 0, length_N, 1)[:, None]
    lengths.append(length_N)
    cosines.append(
      np.einsum('nd,gdl->ngl', unit_ND, direction_GDL, optimize=True)
    )
  return np.concatenate(lengths), np.concatenate(cosines)


def _own(context, words, codes, n_latents, draw, size) -> linear_probes.Sparse:
  """The latents that stand for each letter, found without a draw's words."""
  vals_WK, idx_WK = codes
  is_test_W = words.draw_W == draw
  orders = linear_probes.ranked(
    vals_WK[~is_test_W],
    idx_WK[~is_test_W],
    n_latents,
    words.labels_WL[~is_test_W],
    size.steps,
    _L1,
    context.rng('absorption', 'ranking', draw),
  )

  def values(latents):
    is_of_WKk = idx_WK[:, :, None] == latents
    return np.where(is_of_WKk, vals_WK[:, :, None], 0).sum(1)

  return linear_probes.sparse(
    values, is_test_W, words.labels_WL, orders, _MOST_LATENTS, _LEAST_GAIN
  )


@functools.partial(jax.jit, static_argnums=0)
def _rows(shape, sae, latents):
  return arrays.whole(scored_lib.rows(shape, sae.w_dec_ND, latents), shape.mesh)


def _table(sums, words: Words) -> list[list]:
  """What each letter has, over all draws."""
  rows = [['letter', 'words', 'F1 of the probe', 'latents', 'absorption']]
  for letter, name in enumerate(letters.LETTERS):
    draws = sums['letters'][:, letter].sum()
    if draws:
      probe_f1, latents, fraction = (
        f'{sums[term][:, letter].sum() / draws:.3g}'
        for term in ('probe_f1', 'latents', 'fraction')
      )
      n_words = int(words.labels_WL[:, letter].sum())
      rows.append([name, n_words, probe_f1, latents, fraction])
  return rows
