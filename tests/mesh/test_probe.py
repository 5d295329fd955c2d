"""The whole of probing on meshes and in two processes: one table and report."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder import SaeConfig
from sae_jax.features import results
from sae_jax.probing import tasks
from sae_jax.training import train
from tests.support import planted, probed, processes, reports

# Two shards of the table, so that two processes have one each.
N_LATENTS = 128
MESHES = [(1, 1), (8, 1), (1, 8), (2, 4)]
NEAR = 1e-6
ROUNDED = {
  # Differences of sums of powers, of fewer digits than the sums.
  'std': 1e-5,
  'skew': 1e-4,
  # Student's quantile for two documents is 12.7 standard errors.
  'delta_ce_low': 2e-5,
  'delta_ce_high': 2e-5,
}


@pytest.fixture(scope='module', autouse=True)
def _made_tasks():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, 'load_tasks', reports.made_tasks)
    yield


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """The folder of a store and of a run of a few steps."""
  folder = tmp_path_factory.mktemp('made')
  probed.write_store(str(folder / 'store'))
  config = planted.train_config(
    sae=SaeConfig(probed.D_MODEL, N_LATENTS, 4),
    batch_size=16,
    steps=20,
    sample_rows=60,
  )
  train.train(config, str(folder / 'store'), str(folder / 'run'))
  return folder


def probe(folder, workdir, shape):
  """Probes on the first devices, as many as the mesh has."""
  data, latent = shape
  devices, make_mesh = jax.devices()[: data * latent], mesh_lib.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      mesh_lib,
      'make_mesh',
      lambda data, latent, own=devices: make_mesh(data, latent, own),
    )
    return _probe(folder, workdir, data, latent)


def _probe(folder, workdir, data, latent):
  config = dataclasses.replace(
    reports.CONFIG, mesh_data=data, mesh_latent=latent
  )
  return reports.probe(
    str(folder / 'run'), str(folder / 'store'), workdir, config
  )


@pytest.fixture(scope='module')
def want(made, tmp_path_factory):
  """Report and columns on 2 x 4 devices."""
  workdir = tmp_path_factory.mktemp('want')
  return probe(made, workdir, (2, 4)), columns(workdir)


def columns(workdir):
  report = results.read_report(str(workdir))
  table = results.open_features(str(workdir), report, probed.VOCABULARY)
  return {name: table.column(name) for name in table.columns}


def assert_same(got, want):
  """Whether two workdirs' reports and columns are equal but for rounding."""
  for name, array in want[1].items():
    if array.dtype.kind == 'f':
      by = near(name)
      np.testing.assert_allclose(got[1][name], array, by, by, err_msg=name)
    else:
      np.testing.assert_array_equal(got[1][name], array, err_msg=name)
  assert got[1].keys() == want[1].keys()
  assert_near(got[0], want[0], 'report')


def near(name):
  return ROUNDED.get(name.rpartition('.')[2], NEAR)


def assert_near(got, want, name):
  """Whether two values of JSON are equal but for rounding."""
  if isinstance(want, dict):
    assert got.keys() == want.keys(), name
    for key, value in want.items():
      assert_near(got[key], value, f'{name}.{key}')
  elif isinstance(want, list):
    assert len(got) == len(want), name
    for place, value in enumerate(want):
      assert_near(got[place], value, f'{name}[{place}]')
  elif isinstance(want, float):
    assert got == pytest.approx(want, rel=near(name), abs=near(name)), name
  else:
    assert got == want, name


@pytest.mark.parametrize('shape', [m for m in MESHES if m != (2, 4)])
def test_every_mesh_gives_the_same(made, want, tmp_path, shape):
  report = probe(made, tmp_path, shape)
  assert_same((report, columns(tmp_path)), want)


def test_a_state_that_is_not_merged_over_data_is_seen(
  made, want, tmp_path, monkeypatch
):
  """A control: what one data shard has is not what all have."""
  monkeypatch.setattr(
    'sae_jax.probing.scan.result._tree',
    lambda merge, state: jax.tree.map(lambda a: a[0], state),
  )
  report = probe(made, tmp_path, (2, 4))
  got = columns(tmp_path)
  assert report['nmse'] != pytest.approx(want[0]['nmse'], rel=1e-4)
  for name in ('count', 'top_tokens', 'near_count'):
    assert (got[name] != want[1][name]).any()


def probe_in_a_process(folder):
  """Probes as one of two processes."""
  folder = pathlib.Path(folder)
  tasks.load_tasks = reports.made_tasks
  print(json.dumps(_probe(folder, folder / 'two', 1, 8)))


def test_two_processes_give_what_one_does(made, want):
  code = 'import sys; from tests.mesh import test_probe as t; '
  code += 't.probe_in_a_process(sys.argv[1])'
  printed = processes.run_two(code, [made, made], timeout=800)
  written = results.read_report(str(made / 'two'))
  for of_process in printed:
    assert json.loads(of_process.splitlines()[-1]) == written
  assert_same((written, columns(made / 'two')), want)
  # Nothing that only the pass needs is left.
  assert {path.name for path in (made / 'two').iterdir()} == {
    'features', 'finished.json', 'made_from.json', 'plots', 'report.json',
  }  # fmt: skip
