"""A worker of a sweep that is several processes."""

import pytest

from sae_jax.sweeps import work as work_lib
from sae_jax.sweeps.cells import read_cells
from sae_jax.sweeps.grid import grid
from tests.support import planted, processes


def sweep(store, workdir):
  """Does two runs until they converge; how many are left."""
  config = planted.train_config(steps=100)
  cells = grid(config, [store], {'seed': (0, 1)}, 0.05)
  return work_lib.work(work_lib.WorkConfig(), cells, workdir)


def test_two_processes_are_one_worker(store, tmp_path):
  code = (
    'import sys; from tests.mesh import test_sweeps; '
    f'assert test_sweeps.sweep({store!r}, sys.argv[1]) == 0'
  )
  together, alone = str(tmp_path / 'together'), str(tmp_path / 'alone')
  processes.run_two(code, [together] * 2)
  assert sweep(store, alone) == 0
  of = [
    {r['name']: r['scores'] for r in read_cells(url)}
    for url in (together, alone)
  ]
  assert of[0].keys() == of[1].keys() and len(of[0]) == 2
  for name, scores in of[0].items():
    for rows in ('validation', 'test'):
      want = of[1][name][rows]
      assert scores[rows] == pytest.approx(want, rel=1e-4)
      # Other weights would be seen.
      assert scores[rows]['fvu'] != pytest.approx(
        of[1][next(other for other in of[1] if other != name)][rows]['fvu'],
        rel=1e-4,
      )
  assert not list((tmp_path / 'together' / 'claims').iterdir())
