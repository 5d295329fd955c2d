"""Small stores of random activations."""

import itertools

import numpy as np

from sae_jax.store import writer as writer_lib
from sae_jax.store.manifest import StorePlan

D, CHUNK, SHARD = 6, 8, 32
SITES = ('blocks.1.resid_post', 'blocks.0.mlp_out')
PLAN = {
  'subject': 'toy',
  'sites': SITES[:1],
  'd_model': D,
  'weights_sha256': 'ab',
  'chunk_rows': CHUNK,
  'shard_rows': SHARD,
  'context_length': 16,
  'sources': ('text',),
  'config': {'sources': ('text',)},
  'software': {'sae_jax': '0'},
}


def data(n_stream=150, seed=0):
  """A stream of 150 tokens that keeps most: some 110 rows, 4 shards."""
  rng = np.random.default_rng(seed)
  keep = rng.random(n_stream) < 0.75
  return {
    'tokens': rng.integers(0, 500, n_stream),
    'documents': np.sort(rng.integers(0, 9, n_stream)),
    'positions': np.arange(n_stream) % 16,
    'keep_mask': keep,
    'kept': rng.normal(size=(keep.sum(), D)).astype(np.float32),
  }


def stretches(data, cuts, sites=SITES[:1]):
  """The arguments of `append` for each context, or each stretch of cuts."""
  edges = [0, *(cuts or range(16, len(data['tokens']), 16))]
  row = 0
  for start, stop in itertools.pairwise([*edges, len(data['tokens'])]):
    stretch = [v[start:stop] for k, v in data.items() if k != 'kept']
    kept = data['kept'][row : row + stretch[-1].sum()]
    row += len(kept)
    yield *stretch, {site: kept + i for i, site in enumerate(sites)}


def write(url, data, cuts=(), holdout_rows=11, mask=None, **plan):
  """Writes a finished store; keyword arguments replace fields of its plan."""
  plan = StorePlan(**(PLAN | plan))
  return writer_lib.write(
    url,
    plan,
    stretches(data, cuts, plan.sites),
    holdout_rows=holdout_rows,
    mask=mask or {'rule': 'none'},
  )


def begin(url, data, n_shards=1, **plan):
  """The first shards alone, as an interrupted writer leaves them."""
  writer = writer_lib.StoreWriter(url, StorePlan(**(PLAN | plan)))
  waiting = list(stretches(data, ()))
  for number in range(n_shards):
    shard = writer.shard(number)
    while waiting and shard.has_room(len(waiting[0][0]), waiting[0][3].sum()):
      shard.append(*waiting.pop(0))
    shard.finish()
  return writer


def files(folder):
  """The bytes of each file of a folder, by name."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def flip(array):
  """An array whose last element is another."""
  array = array.copy()
  array.reshape(-1)[-1] += 1
  return array
