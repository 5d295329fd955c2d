"""Which rows the scan reads, and how they are cut into batches."""

import types

import pytest

from sae_jax.probing.scan import codes, rows
from sae_jax.probing.scan.config import ScanConfig

STORE = types.SimpleNamespace(
  manifest=types.SimpleNamespace(n_rows=200_000),
  n_train=150_000,
  test_rows=range(180_000, 200_000),
)


def batches(from_row=0, **sizes):
  pieces = rows.segments(ScanConfig(**sizes), STORE)
  return rows.batches(pieces, 4096, from_row)


def those(spans):
  return [row for span in spans for row in span]


@pytest.mark.parametrize(
  'sizes, read',
  [
    ({}, [range(200_000)]),
    ({'eval_rows': 2, 'pca_rows': 0}, [range(200_000)]),
    ({'feature_rows': 20_000}, [range(150_000), range(180_000, 200_000)]),
    (
      {'feature_rows': 190_000, 'pca_rows': 7, 'eval_rows': 12_000},
      [range(192_000)],
    ),
    (
      {'feature_rows': 1, 'pca_rows': 0, 'eval_rows': 5},
      [range(1), range(180_000, 180_005)],
    ),
  ],
)
def test_each_row_is_read_once_for_all_that_it_serves(sizes, read):
  config, parts = ScanConfig(**sizes), batches(**sizes)
  assert those(range(of.start, of.stop) for of in parts) == those(read)
  assert those(of.pca for of in parts) == [*range(150_000)][: config.pca_rows]
  assert (
    those(of.test for of in parts) == [*STORE.test_rows][: config.eval_rows]
  )
  features = [range(of.start, of.stop) for of in parts if of.features]
  assert those(features) == [*range(min(200_000, config.feature_rows))]
  for of in parts:
    assert 0 < of.stop - of.start <= 4096
    for span in (of.pca, of.test):
      assert of.start <= span.start <= span.stop <= of.stop
    assert not of.features or (
      of.start // codes.SHARD_ROWS == (of.stop - 1) // codes.SHARD_ROWS
    )


def test_what_rows_serve_cuts_no_batch():
  parts = batches(pca_rows=70_001, eval_rows=3)
  shards = -(-200_000 // codes.SHARD_ROWS)
  assert len(parts) <= -(-200_000 // 4096) + shards - 1
  # Of one there are rows that serve one thing, and others that do not.
  assert any(0 < len(of.pca) < of.stop - of.start for of in parts)
  assert any(0 < len(of.test) < of.stop - of.start for of in parts)


def test_batches_go_on_where_they_were():
  parts = batches(feature_rows=20_000)
  for nth in (1, 4, 30):
    assert batches(parts[nth].start, feature_rows=20_000) == parts[nth:]
  # Also at a row that no batch of these begins with.
  left = batches(parts[2].start + 5, feature_rows=20_000)
  assert left[0].start == parts[2].start + 5
  assert those(range(of.start, of.stop) for of in left) == [
    *range(parts[2].start + 5, 150_000),
    *range(180_000, 200_000),
  ]
