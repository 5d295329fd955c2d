"""Results are reused if they are whole, of this version and these inputs."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

import sae_jax
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax.features import results
from sae_jax.probing import report, summary, tasks
from sae_jax.storage import claim
from sae_jax.storage import finished as storage_finished
from tests.support import probed, runs, synthetic_features, tables
from tests.support.reports import CONFIG, made_tasks, probe, WHOLE_BATCHES


@pytest.fixture(scope='module', autouse=True)
def without_files(trained):
  """Checkpoint and tasks are made, not read."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, 'load_tasks', made_tasks)
    patch.setattr(report.checkpoint_lib, 'load', lambda *a, **k: trained)
    yield


@pytest.fixture(scope='module')
def unclean(data, without_files, tmp_path_factory):
  """Results of a command that was killed as soon as they were finished."""
  workdir = tmp_path_factory.mktemp('made') / 'unclean'

  def killed(workdir):
    assert (workdir / storage_finished.NAME).exists()
    raise runs.Stop

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, '_clean', lambda url: killed(pathlib.Path(url)))
    with pytest.raises(runs.Stop):
      probe('', data.url, workdir)
  return workdir


@pytest.fixture(scope='module')
def finished(data, unclean, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('made') / 'probe'
  shutil.copytree(unclean, workdir)
  return workdir, probe('', data.url, workdir)


def test_what_a_killed_one_left_is_removed(
  unclean, finished, data, tmp_path, monkeypatch
):
  def scores(*args):
    raise Called

  monkeypatch.setattr(report, 'scores', scores)
  wanted = {
    'features', 'finished.json', 'made_from.json', 'plots', 'report.json',
  }  # fmt: skip

  def names(workdir):
    return {path.name for path in workdir.iterdir()}

  assert names(unclean) == wanted | {'codes', 'scan', 'scratch'}
  shutil.copytree(unclean, tmp_path / 'copy')
  assert probe('', data.url, tmp_path / 'copy') == finished[1]
  assert names(tmp_path / 'copy') == wanted
  # Control: it is this call that has removed it.
  shutil.copytree(unclean, tmp_path / 'other')
  monkeypatch.setattr(report, '_clean', lambda workdir: None)
  assert probe('', data.url, tmp_path / 'other') == finished[1]
  assert names(tmp_path / 'other') == names(unclean)


def test_finished_work_is_reused_and_other_work_is_not(
  finished, data, monkeypatch
):
  def scores(*args):
    raise Called

  monkeypatch.setattr(report, 'scores', scores)
  workdir, figures = finished
  manifest = workdir / 'features' / 'manifest.json'
  before = manifest.stat().st_mtime_ns
  assert probe('', data.url, workdir) == figures
  assert manifest.stat().st_mtime_ns == before
  # Control: what is not finished is made anew.
  (workdir / 'report.json').rename(workdir / 'away')
  with pytest.raises(Called):
    probe('', data.url, workdir)
  (workdir / 'away').rename(workdir / 'report.json')
  # Results of other inputs stay as they are.
  for change, said in (
    ({'seed': 1}, r'seed: 0 -> 1\)'),
    ({'probe_losses': True}, r'probe_losses: False -> True\)'),
    ({'average': False}, r'average: True -> False\)'),
    ({'pooling': 'last'}, r"pooling: 'mean' -> 'last'\): use another folder"),
  ):
    with pytest.raises(errors.UserError, match=said):
      probe('', data.url, workdir, dataclasses.replace(CONFIG, **change))
  assert probe('', data.url, workdir) == figures


class Called(Exception):
  """Results are made."""


@pytest.fixture
def copy(finished, monkeypatch, tmp_path):
  """A copy of the results, which nothing can make again."""

  def called(*args):
    raise Called

  monkeypatch.setattr(report, 'scores', called)
  shutil.copytree(finished[0], tmp_path / 'copy')
  return tmp_path / 'copy'


def test_results_of_another_version_are_made_again(copy, data, monkeypatch):
  for where, name, value in (
    (sae_jax, '__version__', '0.0.1'),
    (report, 'RESULTS_VERSION', report.RESULTS_VERSION + 1),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(where, name, value)
      with pytest.raises(Called):
        probe('', data.url, copy)
    probe('', data.url, copy)


def test_results_of_other_weights_are_refused(copy, data, trained, monkeypatch):
  """The same config, step and store: what another version trained, say."""
  other = dataclasses.replace(
    trained, sae=trained.sae.replace(b_lat_N=trained.sae.b_lat_N + 1e-6)
  )
  monkeypatch.setattr(report.checkpoint_lib, 'load', lambda *a, **k: other)
  with pytest.raises(errors.UserError, match=r'inputs \(sae_fingerprint: '):
    probe('', data.url, copy)


# More with SAE_JAX_FLIPS; 50 were tried.
FLIPS = int(os.environ.get('SAE_JAX_FLIPS', '4'))


def flipped(sound, rng):
  data = bytearray(sound)
  data[rng.integers(len(data))] ^= 1 << rng.integers(8)
  return data


def use(copy):
  """What the page reads."""
  figures = results.read_report(copy)
  table = results.open_features(copy, figures, probed.VOCABULARY)
  for name in table.columns:
    table.column(name)
  return figures


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('report.json', 'report.json is not as sae-probe wrote it'),
    ('features/manifest.json', r'manifest\.json is not as sae-probe wrote it'),
    ('features/top_acts/c/0/0/0', 'cannot read top_acts/c/0/0/0 of features'),
    ('features/hist_edges/c/0', 'cannot read hist_edges/c/0 of features'),
  ],
)
def test_a_flipped_byte_is_named_and_mended(copy, finished, data, name, said):
  """A page is not built from it, and probing does not reuse it."""
  path, rng = copy / name, np.random.default_rng(0)
  sound = path.read_bytes()
  assert use(copy) == finished[1]
  for _ in range(FLIPS):
    path.write_bytes(flipped(sound, rng))
    with pytest.raises(errors.UserError, match=said):
      use(copy)
    with pytest.raises(Called):
      probe('', data.url, copy)
  path.write_bytes(sound)
  assert probe('', data.url, copy) == finished[1]


def test_a_table_of_an_earlier_version_is_refused_and_made_again(
  copy, finished, data
):
  shutil.rmtree(copy / 'features')
  (copy / 'features.npz').write_bytes(b'PK')
  digests = {n: storage_finished.sha256((copy / n).read_bytes())
             for n in ('report.json', 'features.npz')}  # fmt: skip
  made_from = json.loads((copy / 'finished.json').read_text())['made_from']
  storage_finished.write(copy, made_from, digests)
  with pytest.raises(
    errors.UserError, match=r'features\.npz is a table of an earlier sae_jax'
  ):
    use(copy)
  with pytest.raises(Called):
    probe('', data.url, copy)


def test_a_flipped_byte_of_the_record_changes_nothing_that_is_read(
  copy, finished, data
):
  path, rng = copy / storage_finished.NAME, np.random.default_rng(0)
  sound = path.read_bytes()
  for _ in range(FLIPS):
    path.write_bytes(flipped(sound, rng))
    with contextlib.suppress(errors.UserError):
      assert results.read_report(copy) == finished[1]
    with contextlib.suppress(Called):
      assert probe('', data.url, copy) == finished[1]


def test_a_site_of_another_width_is_probed(tmp_path, monkeypatch):
  store = probed.write_store(str(tmp_path / 'store'), site='blocks.1.mlp_act')
  trained = probed.make_trained(store)
  monkeypatch.setattr(report.checkpoint_lib, 'load', lambda *a, **k: trained)
  figures = probe('', store.url, tmp_path / 'probe', WHOLE_BATCHES)
  assert figures['d_model'] == 24 != probed.D_MODEL
  assert figures['delta_ce'] != 0 and figures['kl'] > 0
  table = results.open_features(tmp_path / 'probe', figures)
  assert (table.column('vote_up_ids') >= 0).all()


def test_latents_without_votes_are_browsed(tmp_path):
  store = probed.write_store(str(tmp_path / 'store'), site='blocks.0.k')
  opened = tables.build(
    probed.make_trained(store),
    store,
    str(tmp_path / 'made'),
    CONFIG.features,
    WHOLE_BATCHES.batch_rows,
  )
  table = {name: opened.column(name) for name in opened.columns}
  words = [f'w{i}' for i in range(probed.VOCABULARY)]
  synthetic_features.build(table, {'n_latents': 24}, words, tmp_path / 'page')
  shard = json.loads((tmp_path / 'page/data/features/00000.json').read_text())
  assert len(shard) == 24
  for latent in shard:
    assert latent['votes_up'] == latent['votes_down']
    assert latent['votes_up'] == {'tokens': [], 'logits': []}


def test_a_report_on_one_document_is_strict_json(data, tmp_path, monkeypatch):
  contexts = store_lib.test_contexts

  def of_one_document(*args):
    found = contexts(*args)
    return found._replace(document_C=np.zeros_like(found.document_C))

  monkeypatch.setattr(store_lib, 'test_contexts', of_one_document)
  figures = probe('', data.url, tmp_path)

  def refuse(constant):
    raise AssertionError(f'{constant} is no JSON')

  text = (tmp_path / 'report.json').read_text()
  assert json.loads(text, parse_constant=refuse) == figures
  assert figures['delta_ce_low'] is figures['delta_ce_high'] is None
  assert '(no interval of one document)' in summary.lines(figures)[2]
  # It is reused, which a NaN that differs from itself prevented.
  monkeypatch.setattr(report, 'scores', None)
  assert probe('', data.url, tmp_path) == figures


def test_a_folder_of_another_is_refused(data, tmp_path):
  used = str(tmp_path / 'used')
  with (
    claim.claim(used),
    pytest.raises(errors.UserError, match='used is in use by another process'),
  ):
    probe('', data.url, used)
  (tmp_path / 'report.json').write_text('{}')
  with pytest.raises(errors.UserError, match=r'report\.json, used and is not'):
    probe('', data.url, tmp_path)
  assert (tmp_path / 'report.json').read_text() == '{}'


def test_results_that_were_stopped_are_made_again(
  finished, data, tmp_path, monkeypatch
):
  """Stopped while it writes, it leaves no record."""

  def stops(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(storage_finished, 'write', stops)
    with pytest.raises(KeyboardInterrupt):
      probe('', data.url, tmp_path)
  assert (tmp_path / 'features' / 'manifest.json').exists()
  assert not (tmp_path / storage_finished.NAME).exists()
  assert probe('', data.url, tmp_path) == finished[1]
