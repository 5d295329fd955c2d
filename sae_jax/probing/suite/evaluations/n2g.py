"""Token patterns as explanations, scored on held-out text without a judge."""

import numpy as np

from sae_jax.probing import spelling
from sae_jax.probing.suite import explained
from sae_jax.probing.suite import patterns as patterns_lib
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import (
  divided,
  ratio,
  Sample,
  SHARE,
  Statistic,
)
from sae_jax.probing.suite.outcome import Outcome
from sae_jax.subject.formats import tokenizer as tokenizer_lib

TITLE = 'Explanations by token patterns (N2G)'
ABOUT = """Each latent of a sample is explained by token patterns, without a
person or a model that judges: of each of some positive activations, drawn at
random on training text, the shortest end of the context on which it keeps half
of the activation, with a wildcard for every token in it whose replacement keeps
half too. On test text a token where a pattern ends is predicted to activate the
latent, with the activation that the pattern was made of.

Precision is how often a prediction is right, recall how much of the latent's
firing is predicted. Beside it stand the latents of the controls, explained in
the same way; the patterns of another latent ("of another latent"), which is
what chance gives; and patterns of the last token alone ("last token"), which
need no search. Gao et al. (2024), section 4.3, after Foote et al. (2023)."""
UNIT = 'latents'
OTHER, LAST = 'of another latent', 'last token'


Size = explained.Size
SIZES = dict(explained.SIZES)
# Latents that the report shows the patterns of.
_SHOWN = 12

STATISTICS = {
  'precision': Statistic(
    'precision',
    'Share of the predicted tokens on which the latent fires; mean over the '
    'latents that are predicted anywhere.',
    ratio('precision', 'predicted'),
    better='high',
    ends=SHARE,
  ),
  'recall': Statistic(
    'recall',
    'Share of the tokens on which the latent fires that are predicted; mean '
    'over the latents that fire on the test text.',
    ratio('recall', 'fires'),
    better='high',
    ends=SHARE,
  ),
  'f1': Statistic(
    'F1',
    'Harmonic mean of precision and recall, 0 where nothing is right; mean '
    'over the latents that fire on the test text.',
    ratio('f1', 'fires'),
    better='high',
    ends=SHARE,
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
  every = explained.of(context, SIZES[context.size])
  samples, tables = {}, {}
  for name, own in every.items():
    kinds = {name: own.patterns}
    if name == context.name:
      # The next latent's; the last one has the first one's.
      kinds[OTHER] = own.patterns[1:] + own.patterns[:1]
      kinds[LAST] = [list(map(_last_token, of)) for of in own.patterns]
      tables['Patterns'] = _table(context, own)
    for kind, of in kinds.items():
      terms = [
        _terms(own.predictions(patterns), own.activations(place))
        for place, patterns in enumerate(of)
      ]
      sums = {term: np.array([t[term] for t in terms]) for term in terms[0]}
      samples[kind] = Sample(own.latents, own.draw_U, sums)
  return Outcome(samples, tables=tables)


def _last_token(pattern: patterns_lib.Pattern) -> patterns_lib.Pattern:
  return patterns_lib.Pattern(pattern.tokens[-1:], False, pattern.value)


def _terms(guess_CT, true_CT) -> dict[str, float]:
  """What one latent adds to the sums."""
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


def _table(context, own: explained.Explained) -> list[list]:
  """Some latents with their patterns, for the report."""
  names = [
    spelling.alone(text)
    for text in tokenizer_lib.token_texts(context.subject.tokenizer)
  ]
  rows = [['latent', 'patterns']]
  for latent, patterns in list(zip(own.latents, own.patterns))[:_SHOWN]:
    texts = dict.fromkeys(patterns_lib.text(p, names) for p in patterns)
    rows.append([int(latent), '; '.join(list(texts)[:3])])
  return rows
