"""The second pass over codes, one latent and one row at a time."""

import collections
import functools
import math

import numpy as np

MASK = 2**64 - 1


class Codes:
  """Codes in memory, as `second_pass` reads them."""

  def __init__(self, start, vals_RK, idx_RK):
    self.start, self._codes = start, (vals_RK, idx_RK)
    self.n_rows, self.k = vals_RK.shape

  def read(self, start, stop):
    assert self.start <= start <= stop <= self.start + self.n_rows
    here = slice(start - self.start, stop - self.start)
    return tuple(array[here] for array in self._codes)


def codes(start, n_rows, k, n_latents, seed=0):
  """Codes with few distinct values, whose last latent is always active.

  Latents 0 and 1 never are, 2 and 3 often are together, and many rows have
  fewer than k.
  """
  rng = np.random.default_rng(seed)
  vals_RK = rng.integers(1, 12, (n_rows, k)).astype(np.float32) / 8
  idx_RK = np.stack(
    [4 + rng.permutation(n_latents - 5)[:k] for _ in range(n_rows)]
  ).astype(np.int32)
  idx_RK[:, 0] = n_latents - 1
  idx_RK[rng.random(n_rows) < 0.3, 1:3] = 2, 3
  off_RK = rng.random((n_rows, k)) < 0.3
  off_RK[:, 0] = False
  vals_RK[off_RK], idx_RK[off_RK] = 0, 0
  return Codes(start, vals_RK, idx_RK)


def activations(codes):
  """{latent: {row: activation}}."""
  active = collections.defaultdict(dict)
  vals_RK, idx_RK = codes.read(codes.start, codes.start + codes.n_rows)
  for row, (vals, idx) in enumerate(zip(vals_RK, idx_RK), codes.start):
    for value, latent in zip(vals.tolist(), idx.tolist()):
      if value > 0:
        active[latent][row] = value
  return active


@functools.cache
def text(store):
  """Each row's place in the stream, the row of a place, and all positions."""
  places = store.stream_index().tolist()
  row_at = {place: row for row, place in enumerate(places)}
  return places, row_at, store.positions().tolist()


def window(codes, store, own, row, before, after):
  """tokens, acts, peak and document of an example.

  Args:
    codes: codes in memory.
    store: the text.
    own: {row: activation} of the latent.
    row: the example's row, -1 for none.
    before: tokens before it.
    after: tokens after it.
  """
  width = before + 1 + after
  tokens, acts = np.full(width, -1), np.zeros(width)
  if row < 0:
    return tokens, acts, -1, -1
  places, row_at, position = text(store)
  stop = codes.start + codes.n_rows
  first = places[codes.start - 1] + 1 if codes.start else 0
  last = places[stop] if stop < len(places) else store.manifest.n_stream
  centre = places[row]
  for column in range(width):
    place = centre - before + column
    if not first <= place < last:
      continue
    if place - position[place] == centre - position[centre]:
      tokens[column] = store.tokens()[place]
      acts[column] = own.get(row_at.get(place), 0)
  return tokens, acts, before, store.documents()[centre]


def splitmix(x):
  """A step of splitmix64 in Python's integers."""
  x = (x + 0x9E3779B97F4A7C15) & MASK
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
  return x ^ (x >> 31)


def decile_rows(own, latent, each, seed):
  """Rows of the examples of each tenth, the lowest first, [10, each]."""
  seeded = splitmix(seed & MASK ^ 0xD6E8FEB86659FD93)
  order = sorted(own, key=lambda row: (-own[row], row))
  tenths = [[] for _ in range(10)]
  for rank, row in enumerate(order):
    tenths[9 - 10 * rank // len(order)].append(row)
  return [
    filled(
      sorted(rows, key=lambda row: splitmix(splitmix(row ^ seeded) ^ latent)),
      each,
      -1,
    )
    for rows in tenths
  ]


def tokens(store, codes, own):
  """(token, count, share) of the tokens on which a latent fires, in order."""
  of_row = store.tokens()[store.stream_index()]
  everywhere = collections.Counter(
    of_row[codes.start : codes.start + codes.n_rows].tolist()
  )
  counts = collections.Counter(of_row[list(own)].tolist())
  return [
    (token, count, count / everywhere[token])
    for token, count in sorted(
      counts.items(), key=lambda item: (-item[1], item)
    )
  ]


def partners(codes, active, latent):
  """(latent, rows, phi) of the partners of a latent, in order."""
  scores, own, n_rows = [], active.get(latent, {}), codes.n_rows
  for other, rows in active.items():
    both, a, b = len(rows.keys() & own.keys()), len(own), len(rows)
    scale = a * (n_rows - a) * b * (n_rows - b)
    if other != latent and both >= 2 and n_rows * both > a * b:
      phi = (n_rows * both - a * b) / math.sqrt(scale)
      scores.append((other, both, phi))
  # Rounding does not order what is equal.
  return sorted(scores, key=lambda item: (-round(item[2], 12), item[0]))


def filled(entries, size, empty):
  """The first entries, with empty ones up to a size."""
  return (list(entries) + [empty] * size)[:size]


def columns(config, codes, store, first, stop, rows, seed):
  """What `second_pass` gives for a block of latents."""
  active, of = activations(codes), collections.defaultdict(list)
  for latent in range(first, stop):
    own = active.get(latent, {})
    kinds = {kind: array[latent - first] for kind, array in rows.items()}
    kinds['decile'] = np.array(
      decile_rows(own, latent, config.decile_examples, seed)
    )
    for kind, example_rows in kinds.items():
      windows = [
        window(
          codes, store, own, row, config.window_before, config.window_after
        )
        for row in example_rows.reshape(-1).tolist()
      ]
      for name, parts in zip(
        ('tokens', 'acts', 'peak', 'document'), zip(*windows)
      ):
        parts = np.array(parts)
        of[f'{kind}_{name}'].append(
          parts.reshape(*example_rows.shape, *parts.shape[1:])
        )
    of_tokens = filled(
      tokens(store, codes, own), config.firing_tokens, (-1, 0, 0)
    )
    of_partners = filled(
      partners(codes, active, latent), config.partners, (-1, 0, 0)
    )
    for name, parts in (
      *zip(('token_ids', 'token_counts', 'token_shares'), zip(*of_tokens)),
      *zip(
        ('partner_ids', 'partner_counts', 'partner_scores'), zip(*of_partners)
      ),
    ):
      of[name].append(parts)
  return {name: np.array(entries) for name, entries in of.items()}
