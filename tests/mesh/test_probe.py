"""The whole of probing on meshes and in two processes: one table and report."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax import features as features_lib
from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder import SaeConfig
from sae_jax.features import results
from sae_jax.probing import pooled, tasks
from sae_jax.training import train
from tests.support import (
  newton_reference,
  planted,
  probed,
  processes,
  reports,
  runs,
)

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
    reports.CONFIG, mesh_data=data, mesh_latent=latent, probe_losses=True
  )
  return reports.probe(
    str(folder / 'run'), str(folder / 'store'), workdir, config
  )


@pytest.fixture(scope='module')
def want(made, tmp_path_factory):
  """Report, columns and the table's record on 2 x 4 devices."""
  workdir = tmp_path_factory.mktemp('want')
  report = probe(made, workdir, (2, 4))
  record = results.open_features(str(workdir), report).record
  return report, columns(workdir), record


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


def test_losses_of_probes_are_those_of_fits_one_by_one(made, want):
  report, of_table, record = want
  assert record['probe_tasks'] == list(report['probes'])
  loaded = reports.made_tasks(None, 2, 56, 100, 0)
  assert record['probe_tasks'] == [task.name for task in loaded]
  trained, mesh = checkpoint.load(str(made / 'run')), mesh_lib.one_device()
  least = []
  for task, loss_N in zip(loaded, of_table['probe_train_ce'].T):
    prompts = reports.pooled_prompts(trained, mesh, task)
    train, _ = tasks.split(task, 0)
    pre_PN = pooled.pre_activations(
      trained, prompts.x_PD[train], np.arange(N_LATENTS)
    )
    labels_P = np.asarray(task.labels_P)[train]
    least.append(newton_reference.losses(pre_PN, [labels_P])[0])
    np.testing.assert_allclose(loss_N, least[-1], atol=2e-6)
    best = report['probes'][task.name]['latent']
    assert best['best_latent'] == loss_N.argmin()
    assert best['train_ce'] == loss_N.min()
  # A control: neither another task nor the next latent would pass.
  assert np.abs(least[0] - least[1]).max() > 1e-2
  assert np.median(np.abs(np.diff(least))) > 1e-3


def test_on_another_mesh_a_table_that_was_begun_is_made_anew(
  made, want, tmp_path, monkeypatch
):
  write = features_lib.TableWriter.write

  def stops_after_one(self, first, columns):
    if first:
      raise runs.Stop
    # Sums of another mesh may be rounded otherwise: these certainly are.
    std_N = np.nextafter(np.float32(columns['std']), np.float32(np.inf))
    write(self, first, columns | {'std': std_N})

  with monkeypatch.context() as patch:
    patch.setattr(features_lib.TableWriter, 'write', stops_after_one)
    with pytest.raises(runs.Stop):
      probe(made, tmp_path / 'stopped', (8, 1))
  shutil.copytree(tmp_path / 'stopped', tmp_path / 'other')
  begun = tmp_path / 'stopped' / 'features' / 'std' / 'c' / '0'
  before = begun.read_bytes()
  report = probe(made, tmp_path / 'stopped', (1, 8))
  assert_same((report, columns(tmp_path / 'stopped')), want)
  assert begun.read_bytes() != before
  # A control: what was begun cannot be gone on with.
  monkeypatch.setattr(results, 'begin', lambda workdir, begun: None)
  with pytest.raises(errors.UserError, match='is there with other bytes'):
    probe(made, tmp_path / 'other', (1, 8))


def probe_in_a_process(folder):
  """Probes as one of two processes.

  Prints whether it has the report that was written, and what it wrote.
  """
  folder = pathlib.Path(folder)
  tasks.load_tasks = reports.made_tasks
  write, firsts = features_lib.TableWriter.write, []

  def noted(self, first, columns):
    firsts.append(first)
    write(self, first, columns)

  features_lib.TableWriter.write = noted
  found = {}
  for data, latent in SPLIT:
    firsts.clear()
    workdir = folder / f'two {data}'
    report = _probe(folder, workdir, data, latent)
    found[data] = report == results.read_report(str(workdir)), list(firsts)
  print(json.dumps(found))


# Each of two processes has half of the latents, or half of the rows.
SPLIT = [(1, 8), (2, 4)]


def test_two_processes_give_what_one_does(made, want):
  code = 'import sys; from tests.mesh import test_probe as t; '
  code += 't.probe_in_a_process(sys.argv[1])'
  printed = processes.run_two(code, [made, made], timeout=800)
  found = [json.loads(of_process.splitlines()[-1]) for of_process in printed]
  for data, _ in SPLIT:
    workdir = made / f'two {data}'
    written = results.read_report(str(workdir))
    # A shard of the table each.
    assert [of[str(data)] for of in found] == [[True, [0]], [True, [64]]]
    assert_same((written, columns(workdir)), want)
    # Nothing that only the pass needs is left.
    assert {path.name for path in workdir.iterdir()} == {
      'features', 'finished.json', 'made_from.json', 'plots', 'report.json',
    }  # fmt: skip
