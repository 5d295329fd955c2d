"""Token patterns as explanations, scored on held-out text without a judge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import progress
from sae_jax.probing import spelling
from sae_jax.probing.suite import ablating, arrays
from sae_jax.probing.suite import patterns as patterns_lib
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.figures import divided, ratio, Sample, Statistic
from sae_jax.probing.suite.outcome import Outcome
from sae_jax.subject import capture
from sae_jax.subject.formats import tokenizer as tokenizer_lib

TITLE = 'Explanations by token patterns (N2G)'
ABOUT = """Each latent of a sample is explained by token patterns, without a
person or a model that judges: of each of its highest activations on training
text the shortest end of the context on which it keeps half of the activation,
with a wildcard for every token in it whose replacement keeps half too. On test
text a token where a pattern ends is predicted to activate the latent, with the
activation that the pattern was made of.

Precision is how often a prediction is right, recall how much of the latent's
firing is predicted. Beside it stand the latents of the controls, explained in
the same way; the patterns of another latent ("of another latent"), which is
what chance gives; and patterns of the last token alone ("last token"), which
need no search. Gao et al. (2024), section 4.3, after Foote et al. (2023)."""
UNIT = 'latents'
OTHER, LAST = 'of another latent', 'last token'


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    latents: of each draw, of each autoencoder.
    tokens: of training text that examples are of, and of test text.
    examples: of each latent.
  """

  latents: int
  tokens: int
  examples: int
  batch_contexts: int = 8


SIZES = {'quick': Size(3, 16_384, 4), 'all': Size(40, 200_000, 16)}
# A latent that fires on fewer tokens of the training text is not explained.
_LEAST_FIRINGS = 5
_LONGEST = 16
# Texts that the subject reads at a time: an example's ends, or those with a
# token replaced.
_TEXTS = _LONGEST + 1
# Tokens that end texts, by the names that families give them.
_PADS = ('<|endoftext|>', '</s>', '<eos>', '<|end_of_text|>', '<pad>')
# Latents that the report shows the patterns of.
_SHOWN = 12

STATISTICS = {
  'precision': Statistic(
    'precision',
    'Share of the predicted tokens on which the latent fires; mean over the '
    'latents that are predicted anywhere.',
    ratio('precision', 'predicted'),
    better='high',
  ),
  'recall': Statistic(
    'recall',
    'Share of the tokens on which the latent fires that are predicted; mean '
    'over the latents that fire on the test text.',
    ratio('recall', 'fires'),
    better='high',
  ),
  'f1': Statistic(
    'F1',
    'Harmonic mean of precision and recall, 0 where nothing is right; mean '
    'over the latents that fire on the test text.',
    ratio('f1', 'fires'),
    better='high',
  ),
  'explained': Statistic(
    'activation explained',
    'Share of the sum of squared activations that predictions take away: 1 if '
    'they are exact, 0 if nothing is predicted, below 0 if they do harm.',
    lambda sums: 1 - divided(sums['left'], sums['squares']),
    better='high',
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  texts = {
    kind: context.texts(-(-size.tokens // context.draws), 'n2g', kind)
    for kind in ('training', 'test')
  }
  samples, tables = {}, {}
  for name, scored in context.scored.items():
    latents = _Latents(context, scored, size)
    chosen, draw_U = latents.choose(context.rng('n2g', name), texts['training'])
    with progress.bar(
      total=len(chosen), unit='latent', desc=f'N2G: {name}'
    ) as bar:
      explained = []
      for examples in chosen.values():
        explained.append(latents.explain(*examples))
        bar.update(1)
    true = latents.activations(texts['test'], list(chosen))
    kinds = {name: explained}
    if name == context.name:
      # The next latent's; the last one has the first one's.
      kinds[OTHER] = explained[1:] + explained[:1]
      kinds[LAST] = [list(map(_last_token, of)) for of in explained]
      tables['Patterns'] = _table(context, list(chosen), explained)
    for kind, of in kinds.items():
      terms = [
        _terms(patterns, texts['test'], true_CT)
        for patterns, true_CT in zip(of, true)
      ]
      sums = {term: np.array([t[term] for t in terms]) for term in terms[0]}
      samples[kind] = Sample(np.array(list(chosen)), draw_U, sums)
  return Outcome(samples, tables=tables)


class _Latents:
  """The latents of an autoencoder on texts."""

  def __init__(self, context: Context, scored: scored_lib.Scored, size: Size):
    self._context, self._scored, self._size = context, scored, size
    tokenizer, bos = context.subject.tokenizer, context.store.manifest.bos
    start = tokenizer_lib.context_start(tokenizer, bos)
    self._start = [] if start is None else [start]
    self._pad = _pad_token(tokenizer)

  def codes(self, texts) -> tuple[np.ndarray, np.ndarray]:
    """Values and latents of all kept tokens of texts, [C, T, K]; else 0."""
    size, mesh = self._size, self._context.mesh
    vals, idx = [], []
    for start, stop in arrays.batches(
      size.batch_contexts, len(texts.length_C), mesh
    ):
      tokens = arrays.on_data(
        texts.tokens_CT[start:stop], size.batch_contexts, mesh
      )
      out = _codes(
        self._context.subject.config,
        self._context.site,
        self._scored.shape,
        self._context.params,
        self._scored.sae,
        tokens,
      )
      own_vals, own_idx = (arrays.to_host(of, stop - start) for of in out)
      vals.append(np.where(texts.kept_CT[start:stop, :, None], own_vals, 0))
      idx.append(own_idx)
    return np.concatenate(vals), np.concatenate(idx)

  def choose(self, rng, texts):
    """Latents to explain -> contexts and activations of their examples.

    Args:
      rng: chooses among those that fire often enough.
      texts: the training text.

    Returns:
      By latent, the tokens up to each example and the activation there; and
      the draw that each latent is of.
    """
    vals_CTK, idx_CTK = self.codes(texts)
    fires = vals_CTK > 0
    counts = np.bincount(
      idx_CTK[fires], minlength=self._scored.shape.config.n_latents
    )
    able = np.flatnonzero(counts >= _LEAST_FIRINGS)
    draws = self._context.draws
    if len(able) < draws:
      raise CannotMeasure(
        f'{len(able)} latents fire on {_LEAST_FIRINGS} tokens or more of '
        f'{int(texts.length_C.sum())} of training text, {draws} are the fewest '
        'that are explained: harvest more text'
      )
    order = rng.permutation(able)
    dealt = [order[draw::draws][: self._size.latents] for draw in range(draws)]
    chosen = {}
    for latent in np.concatenate(dealt).tolist():
      value_CT = np.where(fires & (idx_CTK == latent), vals_CTK, 0).max(-1)
      chosen[latent] = (latent, *self._examples(texts, value_CT))
    return chosen, np.repeat(np.arange(draws), list(map(len, dealt)))

  def _examples(self, texts, value_CT):
    """The highest activation of each context, the highest contexts first."""
    at_C = value_CT.argmax(1)
    peak_C = value_CT.max(1)
    best = np.argsort(-peak_C, kind='stable')[: self._size.examples]
    best = best[peak_C[best] > 0]
    first = len(self._start)
    tokens = [texts.tokens_CT[c, first : at_C[c] + 1].tolist() for c in best]
    return tokens, peak_C[best]

  def explain(self, latent, tokens, values) -> list[patterns_lib.Pattern]:
    """The patterns of a latent, of its examples."""
    return [
      patterns_lib.trimmed(
        patterns_lib.of_example(
          own,
          value,
          lambda texts: self._last(latent, texts),
          self._pad,
          _LONGEST,
        )
      )
      for own, value in zip(tokens, values)
      if own
    ]

  def _last(self, latent: int, texts: list[list[int]]) -> np.ndarray:
    """The latent's activation on the last token of each text."""
    width = len(self._start) + _LONGEST + 1
    tokens = np.zeros((_TEXTS, width), np.int32)
    last = np.zeros(_TEXTS, np.int32)
    for row, text in enumerate(texts):
      whole = self._start + text
      tokens[row, : len(whole)] = whole
      last[row] = len(whole) - 1
    mesh = self._context.mesh
    out = _last_values(
      self._context.subject.config,
      self._context.site,
      self._scored.shape,
      self._context.params,
      self._scored.sae,
      arrays.on_data(tokens, _TEXTS, mesh),
      arrays.on_data(last, _TEXTS, mesh),
      latent,
    )
    return arrays.to_host(out, len(texts))

  def activations(self, texts, latents: list[int]) -> list[np.ndarray]:
    """The activations [C, T] of latents on kept tokens of texts."""
    vals_CTK, idx_CTK = self.codes(texts)
    return [
      np.where(idx_CTK == latent, vals_CTK, 0).max(-1) for latent in latents
    ]


def _pad_token(tokenizer) -> int:
  """A token that says nothing: one that ends texts, or else the first."""
  for name in _PADS:
    token = tokenizer.token_to_id(name)
    if token is not None:
      return token
  return 0


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _codes(config, site, shape, params, sae, tokens_BT):
  raw_BTD = capture.capture(config, params, tokens_BT, site)
  flat_BD = raw_BTD.reshape(-1, raw_BTD.shape[-1])
  codes = scored_lib.codes(shape, sae, flat_BD)
  codes = [of.reshape(*tokens_BT.shape, -1) for of in codes]
  return arrays.whole(codes, shape.mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _last_values(config, site, shape, params, sae, tokens_BT, last_B, latent):
  raw_BTD = capture.capture(config, params, tokens_BT, site)
  last_BD = ablating.at_token(raw_BTD, last_B)
  vals_BK, idx_BK = scored_lib.codes(shape, sae, last_BD)
  value_B = jnp.where(idx_BK == latent, vals_BK, 0).max(-1)
  return arrays.whole(value_B, shape.mesh)


def _last_token(pattern: patterns_lib.Pattern) -> patterns_lib.Pattern:
  return patterns_lib.Pattern(pattern.tokens[-1:], False, pattern.value)


def _terms(patterns, texts, true_CT) -> dict[str, float]:
  """What one latent adds to the sums."""
  guess_CT = patterns_lib.predictions(patterns, texts.tokens_CT, texts.length_C)
  guess_CT = np.where(texts.kept_CT, guess_CT, 0)
  fires_CT, says_CT = true_CT > 0, guess_CT > 0
  both, fires, says = (
    int(of.sum()) for of in (fires_CT & says_CT, fires_CT, says_CT)
  )
  return {
    'precision': both / says if says else 0,
    'predicted': float(says > 0),
    'recall': both / fires if fires else 0,
    'fires': float(fires > 0),
    'f1': 2 * both / (fires + says) if fires else 0,
    'left': float(((true_CT - guess_CT) ** 2).sum()),
    'squares': float((true_CT**2).sum()),
  }


def _table(context, chosen, explained) -> list[list]:
  """Some latents with their patterns, for the report."""
  names = [
    spelling.alone(text)
    for text in tokenizer_lib.token_texts(context.subject.tokenizer)
  ]
  rows = [['latent', 'patterns']]
  for latent, patterns in list(zip(chosen, explained))[:_SHOWN]:
    texts = dict.fromkeys(patterns_lib.text(p, names) for p in patterns)
    rows.append([int(latent), '; '.join(list(texts)[:3])])
  return rows
