"""Codes of many rows, through reducers by batches and shards, and by loops."""

import dataclasses
import functools

import jax
import numpy as np

from sae_jax.probing.scan import pairs as pairs_lib

# What batches are filled up to, so that all cuts run one program.
BATCH = 256


@dataclasses.dataclass(frozen=True)
class Codes:
  """Candidates of each row, of which some are active."""

  vals_RC: np.ndarray
  idx_RC: np.ndarray
  rank_RC: np.ndarray
  margin_RC: np.ndarray
  row_R: np.ndarray
  document_R: np.ndarray
  active_RC: np.ndarray

  def take(self, rows) -> 'Codes':
    return Codes(
      *(getattr(self, field.name)[rows] for field in dataclasses.fields(self))
    )


def codes(n_rows=700, n_latents=24, k=6, seed=0, values=None) -> Codes:
  """Random codes; latent 0 never fires, latent 1 once, the last one often.

  Args:
    n_rows: number of rows, numbered from just below 2**32 on.
    n_latents: number of latents.
    k: candidates of a row.
    seed: of all that is random.
    values: the values that occur; None for a continuum.
  """
  rng = np.random.default_rng(seed)
  taste_N = rng.random((n_rows, n_latents)) * np.linspace(1, 3, n_latents)
  taste_N[:, :2] = -1
  taste_N[n_rows // 3, 1] = 9
  idx_RC = np.argsort(-taste_N, axis=1)[:, :k]
  shape = idx_RC.shape
  vals_RC = rng.lognormal(0, 2, shape)
  if values is not None:
    vals_RC = rng.choice(values, shape)
  vals_RC = -np.sort(-vals_RC.astype(np.float32), axis=1)
  active_RC = rng.random(shape) < 0.8
  active_RC[n_rows // 3] = True
  return Codes(
    vals_RC=vals_RC,
    idx_RC=idx_RC.astype(np.int32),
    rank_RC=np.broadcast_to(np.arange(k, dtype=np.int32), shape),
    margin_RC=vals_RC - vals_RC[:, -1:],
    row_R=2**32 - n_rows // 2 + np.arange(n_rows),
    # Documents of a few rows, some of which come back later.
    document_R=(np.arange(n_rows) // 5 % 31).astype(np.int32),
    active_RC=active_RC,
  )


def pairs(
  batch: Codes, n_own: int, first: int = 0, size: int = 0, make=pairs_lib.pairs
):
  """The pairs of a batch and a shard; rows are added up to a size."""
  short = max(0, size - len(batch.row_R))

  def filled(of):
    return np.pad(of, ((0, short), *[(0, 0)] * (of.ndim - 1)))

  own_RC = (batch.idx_RC >= first) & (batch.idx_RC < first + n_own)
  return _COMPILED[make](
    filled(batch.vals_RC),
    filled(batch.idx_RC - first),
    filled(batch.rank_RC),
    filled(batch.margin_RC),
    filled((batch.row_R >> 32).astype(np.uint32)),
    filled((batch.row_R & 0xFFFFFFFF).astype(np.uint32)),
    filled(batch.document_R),
    filled(batch.active_RC & own_RC),
    n_own=n_own,
    first_latent=first,
  )


_COMPILED = {
  make: jax.jit(make, static_argnames='n_own')
  for make in (pairs_lib.pairs, pairs_lib.slots)
}


def run(
  reducer,
  of: Codes,
  n_latents: int,
  sizes=(),
  shards=1,
  owners=1,
  update=None,
  make=pairs_lib.pairs,
):
  """The reducer's columns of all latents.

  Args:
    reducer: what is run.
    of: the codes, in the order in which they come.
    n_latents: number of latents.
    sizes: sizes of the first batches; the others have `BATCH` rows.
    shards: of the rows, that are merged at the end.
    owners: shards of the latents.
    update: a compiled `reducer.update`, for tests that run it often.
    make: `pairs.pairs`, or `pairs.slots`.
  """
  # What was compiled of an equal reducer is not used again.
  update = update or jax.jit(lambda *args: reducer.update(*args))
  merge = jax.jit(lambda a, b: reducer.merge(a, b))
  n_own = n_latents // owners
  columns = []
  for owner in range(owners):
    states = []
    for shard in np.array_split(np.arange(len(of.row_R)), shards):
      state = reducer.init(n_own)
      for rows in _cut(shard, sizes):
        batch = pairs(of.take(rows), n_own, owner * n_own, BATCH, make)
        state = update(state, batch)
      states.append(state)
    # The last is merged first.
    state = functools.reduce(merge, states[::-1])
    columns.append(reducer.finish(jax.device_get(state)))
  return {
    name: np.concatenate([of[name] for of in columns]) for name in columns[0]
  }


def _cut(rows, sizes):
  for size in (*sizes, *[BATCH] * (-(-len(rows) // BATCH))):
    if len(rows):
      yield rows[:size]
      rows = rows[size:]


def of_latent(of: Codes, latent: int):
  """(row, value, rank, margin, document) of a latent's pairs, a loop."""
  for r, c in np.argwhere((of.idx_RC == latent) & of.active_RC):
    yield (
      int(of.row_R[r]),
      of.vals_RC[r, c],
      int(of.rank_RC[r, c]),
      float(of.margin_RC[r, c]),
      int(of.document_R[r]),
    )


def best(of: Codes, n_latents: int, m: int, key, distinct: bool):
  """rows_NM, values_NM and documents_NM by sorting all pairs of a latent.

  Args:
    of: the codes.
    n_latents: N.
    m: M.
    key: key of (latent, row, value).
    distinct: whether a document has one pair alone.
  """
  rows_NM = np.full((n_latents, m), -1)
  values_NM, documents_NM = np.zeros((n_latents, m)), rows_NM.copy()
  for latent in range(n_latents):
    offers = [
      (-int(key(latent, row, value)), row, float(value), document)
      for row, value, _, _, document in of_latent(of, latent)
    ]
    kept, seen = [], set()
    for _, row, value, document in sorted(offers):
      if not distinct or document not in seen:
        kept.append((row, value, document))
      seen.add(document)
    for place, (row, value, document) in enumerate(kept[:m]):
      rows_NM[latent, place] = row
      values_NM[latent, place] = value
      documents_NM[latent, place] = document
  return rows_NM, values_NM, documents_NM
