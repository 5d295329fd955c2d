"""The benchmarks of probing do all of it, on what they say."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import probe, probe_scale
from sae_jax import checkpoint, features, store
from sae_jax import mesh as mesh_lib

SIZES = probe_scale.BenchmarkConfig(n=192, d=48, k=4, alive=20, rows=1600)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('scale'))
  probe_scale.make(SIZES, folder)
  return folder


def test_the_made_latents_fire_and_no_others(workdir, capsys):
  result = probe_scale.probe(SIZES, workdir)
  shown = capsys.readouterr().out.splitlines()
  assert [[*json.loads(line)] for line in shown] == [
    [n] for n in result['stages']
  ]
  assert all(of['peak_gib'] > 0 for of in result['stages'].values())
  table = features.open(f'{workdir}/probe/features')
  count_N = table.column('count')
  np.testing.assert_array_equal(
    np.flatnonzero(count_N), probe_scale.alive(SIZES)
  )
  # Each row has K of them; those that rounding ties are rarely others.
  n_rows = 1600 - 1600 % 128
  assert count_N.sum() == n_rows * SIZES.k == 4 * 1536
  assert result['fired'] == SIZES.alive
  # Asked for none of what takes N x N products or a subject.
  for name in ('neighbour_ids', 'vote_up_ids', 'vote_down_logits'):
    assert table.column(name).shape == (SIZES.n, 0)


def test_ratios_are_of_each_turn_and_the_first_does_not_count(
  workdir, tmp_path, monkeypatch
):
  mesh = mesh_lib.make_mesh(1, 1, jax.devices()[:1])
  trained = checkpoint.load(f'{workdir}/train', mesh=mesh)
  opened = store.open_store(f'{workdir}/store')
  # Of encoding and of both scans by turns, then of what follows.
  seconds = [100, 5, 1, 2, 3, 4, 4, 5, 6, 2, 4, 2, 7, 8]
  encoded, scans = [], []

  def timed(function):
    return (seconds.pop(0), 1), function()

  def encode(config, sae, raw_BD):
    encoded.append(len(raw_BD))

  def scan(config, *others):
    scans.append(config)

  class Writer:
    def seal(self, record):
      pass

  monkeypatch.setattr(probe, 'timed', timed)
  monkeypatch.setattr(probe, '_encode', encode)
  monkeypatch.setattr(probe, 'scan', scan)
  monkeypatch.setattr(probe.table, 'fill', lambda *args, **kwargs: Writer())
  config = probe.BenchmarkConfig(rows=1200, batch_rows=512, repeats=3)
  result = probe.measure(
    config, trained, opened, None, mesh, str(tmp_path / 'probe')
  )
  assert result['rows'] == 1200
  assert encoded == [512] * 3 * 4
  assert {of.feature_rows for of in scans} == {1200} and len(scans) == 8
  # The first of a turn has no components and the fewest rows to score.
  assert [(of.pca_rows, of.eval_rows) for of in scans[:2]] == [
    (0, 2),
    (1200, probe.ScanConfig.eval_rows),
  ]
  assert result['ratio'] == {'scan_without_scores': 1.5, 'scan': 1.5}
  assert result['processor_ratio'] == {'scan_without_scores': 1, 'scan': 1}
  assert result['seconds'] == {
    'read_and_encode': 2, 'scan_without_scores': 4, 'scan': 4, 'neighbours': 7,
    'second_pass_and_table': 8,
  }  # fmt: skip
