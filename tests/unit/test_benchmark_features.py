"""The benchmark of feature tables measures tables that are sound."""

import numpy as np

from experiments.benchmarks import features
from sae_jax import features as features_lib
from sae_jax.features import columns


def test_its_table_has_every_column_and_silent_latents(tmp_path):
  assert features.write(str(tmp_path), 128, 4) > 0
  table = features_lib.open(tmp_path, features.VOCABULARY)
  assert table.columns.keys() == columns.COLUMNS.keys()
  block = table.latents(0, 128)
  alive = block['count'] > 0
  assert 0 < alive.sum() <= 32
  assert np.isin(np.flatnonzero(alive), range(0, 128, 4)).all()
  assert (block['top_peak'][~alive] == -1).all()
  assert features.read(str(tmp_path), 128)['block_ms_median'] > 0
  sizes = features.on_disk(str(tmp_path))
  assert sizes['files'] > len(columns.COLUMNS) and sizes['megabytes'] > 0
