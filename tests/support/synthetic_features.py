"""A feature table as probing makes it, from English-like text.

A latent fires on a handful of trigger tokens, weakly on what follows them;
every array is then computed from those activations, so they agree with each
other as real ones do.
"""

import os
import re
import tempfile

import numpy as np

from sae_jax.browser import index
from sae_jax.features import columns, results, writer

SENTENCES = r"""
The Prime Minister told Parliament on Tuesday that the budget would be late.
President of the council, she answered every question from the committee.
The senator voted against the bill, but the committee passed it anyway.
It was the worst film I have seen this year; even the music was terrible.
A wonderful cast and a clever script make this film a joy from start to end.
The acting is wooden, the plot is thin, and the ending makes no sense.
def read(path):\n    with open(path) as file:\n        return file.read()\n
for index, value in enumerate(values):\n    total += value * weights[index]\n
if not isinstance(value, int):\n    raise TypeError('value must be an int')\n
import os\nimport sys\n\nclass Reader(object):\n    def __init__(self):\n
She walked along the river until the evening, and the rain had stopped.
The garden was quiet, the house was dark, and nobody answered the door.
My grandmother kept the letters in a wooden box under her bed.
Water boils at 100 degrees, but on a high mountain it boils sooner.
The cell divides, and each half carries a copy of the same molecule.
Light from the star takes four years to reach the telescope.
The patient was given a small dose of the medicine after dinner.
Doctors found that the treatment lowered the blood pressure of patients.
In 1914 the war began; in 1918, after four years, it ended.
On March 3, 1997 the company opened an office in Berlin and one in Paris.
The train from Paris to Berlin takes eight hours, the plane takes two.
Shares of the company fell by 12 percent after the report on Monday.
The bank raised the rate by a quarter of a percent, to 5 percent.
Please send the report to the office before noon, and thank you.
He said that he would not go, and she said that he would.
"I do not know," said the captain, "but we will find out tomorrow."
The team scored twice in the first half and won the game by a goal.
Add the onions, a little salt and the butter, then stir for ten minutes.
If the bread is dry, add a spoon of water and wait for an hour.
The court ruled that the law was not valid, and the judge agreed.
""".strip().split('\n')

HOSTILE = (
  "<img src=x onerror=alert('token')>",
  '</script><script>alert(1)</script>',
  '<svg/onload=alert(2)>',
  '&lt;b&gt;',
  '"><style>*{display:none}</style>',
  '\u202eright to left',
  '\u200f',
  '\x00',
  '\x1b[31m',
  '\t',
  '\r',
  '\u2028',
  '\u0301',
  '\ud83d',
  'שלום',
  '日本',
  '🙂',
  '\\xe2',
  '    ',
  '{{7*7}}',
  'javascript:alert(3)',
  '\n\n        ',
)
N_HOSTILE_LATENT = 7


def make(
  n_latents: int = 300,
  n_examples: int = 8,
  window: int = 48,
  n_tokens: int = 24_000,
  seed: int = 0,
) -> tuple[dict[str, np.ndarray], dict, list[str]]:
  """Returns table, report and vocabulary; some latents never fire.

  Latent `N_HOSTILE_LATENT` fires on hostile tokens and votes for them.
  """
  rng = np.random.default_rng(seed)
  stream, documents, vocabulary = _text(rng, n_tokens)
  acts_NR, dead_N = _activations(rng, n_latents, stream, len(vocabulary))
  positive = [row[row > 0].astype(np.float64) for row in acts_NR]
  edges = np.geomspace(1e-2, 1e2, 41).astype(np.float32)
  count = np.array([len(row) for row in positive])
  moments = np.array([_moments(row) for row in positive])
  arrays = {
    'latent_ids': np.arange(n_latents),
    'count': count,
    **dict(zip(columns.MOMENTS, (count / len(stream), *moments.T))),
    'hist_edges': edges,
    'hist_counts': np.stack([np.histogram(p, edges)[0] for p in positive]),
  }
  places = {'top': [], 'random': []}
  for row in acts_NR:
    fired = np.flatnonzero(row)
    best = fired[np.argsort(-row[fired], kind='stable')][:n_examples]
    random = rng.permutation(fired)[:n_examples]
    for kind, chosen in (('top', best), ('random', random)):
      missing = n_examples - len(chosen)
      places[kind].append(np.pad(chosen, (0, missing), constant_values=-1))
  for kind, rows in places.items():
    at = np.stack(rows)
    arrays |= _windows(kind, at, acts_NR, stream, documents, window)
  for way, sign in (('up', 1), ('down', -1)):
    ids = rng.permuted(
      np.tile(np.arange(len(vocabulary)), (n_latents, 1)),
      axis=1,
    )[:, :10]
    logits = -np.sort(-rng.gamma(2, 0.4, ids.shape), axis=1)
    # The hostile latent votes for the first and against the last of them.
    ids[N_HOSTILE_LATENT] = np.arange(10)
    if way == 'down':
      ids[N_HOSTILE_LATENT] += len(HOSTILE) - 10
    arrays[f'vote_{way}_ids'] = ids
    arrays[f'vote_{way}_logits'] = sign * logits
  decoder = rng.standard_normal((n_latents, 32))
  decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
  cosines = decoder @ decoder.T - 2 * np.eye(n_latents)
  near = np.argsort(-cosines, axis=1)[:, :5]
  arrays['neighbour_ids'] = near
  arrays['neighbour_cosines'] = np.take_along_axis(cosines, near, axis=1)
  arrays |= _effects(n_latents, len(vocabulary), rng)
  report = _report(n_latents, n_tokens, dead_N)
  arrays = {
    name: np.asarray(array, columns.COLUMNS[name].dtype)
    for name, array in arrays.items()
  }
  return arrays, report, vocabulary


def _effects(n_latents, vocabulary_size, rng):
  """Effects of two of three latents."""
  measured = np.arange(n_latents) % 3 > 0
  arrays = {
    f'effect_{name}': np.where(
      measured, rng.uniform(-0.5, 2, n_latents), np.nan
    )
    for name in ('kl', 'ce')
  }
  arrays['effect_kl'] = np.abs(arrays['effect_kl'])
  for way, sign in (('up', 1), ('down', -1)):
    ids = np.array(
      [rng.permutation(vocabulary_size)[:4] for _ in range(n_latents)]
    )
    changes = np.sort(rng.uniform(0.01, 0.9, (n_latents, 4)))[:, ::-1]
    arrays[f'effect_{way}_ids'] = np.where(measured[:, None], ids, -1)
    arrays[f'effect_{way}_changes'] = measured[:, None] * sign * changes
  return {
    name: array.astype(columns.COLUMNS[name].dtype)
    for name, array in arrays.items()
  }


def build(features, report, vocabulary, out, config=None, explained=None):
  """Writes a table to a folder of its own, and a page of it; the page's URL."""
  with tempfile.TemporaryDirectory() as folder:
    url = os.path.join(folder, 'features')
    writer.write(url, features)
    return index.build_index(url, report, vocabulary, out, config, explained)


def write_results(workdir, made_from, report, features):
  """Finished results as sae-probe writes them, but for its plots."""
  results.begin(workdir, made_from)
  writer.write(results.features_url(workdir), features)
  results.write(workdir, made_from, report)


def _text(rng, n_tokens):
  """A token stream, the document of each token, and the vocabulary."""
  pieces, documents = [], []
  hostile_every = 12
  number = 0
  while len(pieces) < n_tokens:
    picked = rng.choice(len(SENTENCES), 4, replace=False)
    text = ' '.join(SENTENCES[i].replace('\\n', '\n') for i in picked)
    tokens = re.findall(r' ?[^\W\d]+|\d| ?[^\w\s]|\n| +(?= )|\s', text)
    if number % hostile_every == 0:
      for token in rng.permutation(np.array(HOSTILE, object))[:6]:
        tokens.insert(int(rng.integers(len(tokens))), str(token))
    pieces += tokens
    documents += [number] * len(tokens)
    number += 1
  pieces, documents = pieces[:n_tokens], documents[:n_tokens]
  vocabulary = list(HOSTILE) + sorted(set(pieces) - set(HOSTILE))
  ids = {piece: i for i, piece in enumerate(vocabulary)}
  stream = np.array([ids[piece] for piece in pieces], np.int32)
  return stream, np.array(documents, np.int32), vocabulary


def _activations(rng, n_latents, stream, vocabulary_size):
  acts_NR = np.zeros((n_latents, len(stream)), np.float32)
  dead_N = rng.random(n_latents) < 0.08
  dead_N[N_HOSTILE_LATENT] = False
  for latent in range(n_latents):
    if dead_N[latent]:
      continue
    if latent == N_HOSTILE_LATENT:
      triggers = np.arange(len(HOSTILE))
    else:
      triggers = rng.choice(vocabulary_size, rng.integers(1, 4), replace=False)
    for trigger in triggers:
      fired = np.flatnonzero(stream == trigger)
      kept = fired[rng.random(len(fired)) < rng.uniform(0.3, 1)]
      strength = rng.lognormal(1.2, 0.3)
      acts_NR[latent, kept] = strength * rng.lognormal(0, 0.35, len(kept))
      after = np.minimum(kept + 1, len(stream) - 1)
      weak = acts_NR[latent, kept] * rng.uniform(0.05, 0.4, len(kept))
      weak *= rng.random(len(kept)) < 0.5
      acts_NR[latent, after] = np.maximum(acts_NR[latent, after], weak)
  return acts_NR, dead_N


def _moments(positive):
  """Max, mean, standard deviation and skewness of the positive values."""
  if not len(positive):
    return 0, 0, 0, 0
  mean, std = positive.mean(), positive.std()
  skew = ((positive - mean) ** 3).mean() / std**3 if std else 0
  return positive.max(), mean, std, skew


def _windows(kind, at_NM, acts_NR, stream, documents, window):
  """Tokens and activations around each place, within its document."""
  n_latents, n_examples = at_NM.shape
  tokens = np.full((n_latents, n_examples, window), -1, np.int32)
  acts = np.zeros(tokens.shape, np.float32)
  peak = np.full(at_NM.shape, -1, np.int32)
  document = np.full(at_NM.shape, -1, np.int32)
  for (latent, example), place in np.ndenumerate(at_NM):
    if place < 0:
      continue
    first = max(0, place - window * 2 // 3)
    part = np.arange(first, min(first + window, len(stream)))
    part = part[documents[part] == documents[place]]
    tokens[latent, example, : len(part)] = stream[part]
    acts[latent, example, : len(part)] = acts_NR[latent, part]
    peak[latent, example] = np.flatnonzero(part == place)[0]
    document[latent, example] = documents[place]
  return {
    f'{kind}_tokens': tokens,
    f'{kind}_acts': acts,
    f'{kind}_peak': peak,
    f'{kind}_document': document,
  }


def _report(n_latents, n_tokens, dead_N):
  return {
    'nmse': 0.1829,
    'fvu': 0.1931,
    'fvu_pca': 0.2987,
    'fvu_untrained': 0.9124,
    'l0': 31.6,
    'dead_fraction': float(dead_N.mean()),
    'delta_ce': 0.2134,
    'delta_ce_low': 0.1871,
    'delta_ce_high': 0.2402,
    'ce_recovered': 0.9731,
    'kl': 0.2209,
    'subject': 'smollm2-135m',
    'site': 'blocks.14.resid_post',
    'n_latents': n_latents,
    'k': 32,
    'n_tokens': n_tokens,
    'control_definitions': {
      'random': 'The best of as many random directions as there are latents.',
      'channel': 'The best single channel of the activation.',
    },
    'probes': {
      'sentiment of reviews': _probe(('negative', 'positive'), 12, 0.871),
      'kind of text': _probe(('prose', 'source code'), 45, 0.993),
    },
  }


def _probe(classes, latent, auc):
  def score(auc):
    return {
      'best_latent': latent,
      'train_ce': 0.402,
      'test_ce': 0.447,
      'test_auc': auc,
      'test_auc_low': auc - 0.04,
      'test_auc_high': min(1, auc + 0.03),
      'prevalence_ce': 0.693,
    }

  return {
    'classes': list(classes),
    'prompts': 200,
    'latent': score(auc),
    'controls': {
      'permuted': score(0.512),
      'random': score(0.664),
      'channel': score(0.707),
      'pca': score(0.741),
      'brand new': score(0.633),
    },
  }
