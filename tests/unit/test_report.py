"""The report: each number is its function's own, and misfits are refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax import features as features_lib
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax.autoencoder import nonlinearity, SaeConfig
from sae_jax.browser import index
from sae_jax.probing import (
  baselines,
  downstream,
  pooled,
  probes,
  reconstruction,
  references,
  report,
  summary,
  tasks,
)
from sae_jax.probing.examples import FeatureConfig
from sae_jax.training import train
from sae_jax.training.objective import ObjectiveConfig
from tests.support import planted, probed, runs, tables
from tests.support.reports import (
  CONFIG,
  made_tasks,
  pooled_prompts,
  probe,
  WHOLE_BATCHES,
)


@pytest.fixture(scope='module')
def store_url(tmp_path_factory):
  url = str(tmp_path_factory.mktemp('made') / 'store')
  probed.write_store(url)
  return url


@pytest.fixture(scope='module')
def run(store_url, tmp_path_factory):
  """The workdir of a few training steps."""
  workdir = str(tmp_path_factory.mktemp('made') / 'run')
  config = planted.train_config(
    sae=SaeConfig(probed.D_MODEL, 24, 4),
    batch_size=16,
    steps=20,
    sample_rows=60,
  )
  train.train(config, store_url, workdir)
  return workdir


@pytest.fixture(autouse=True)
def without_the_package(monkeypatch):
  monkeypatch.setattr(tasks, 'load_tasks', made_tasks)


@pytest.fixture(scope='module')
def finished(run, store_url, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('made') / 'probe'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, 'load_tasks', made_tasks)
    return workdir, probe(run, store_url, workdir)


@pytest.fixture(scope='module')
def parts(run, store_url):
  return checkpoint.load(run), store_lib.open_store(store_url)


def test_reconstruction_scores_are_the_functions_own(finished, parts):
  trained, data = parts
  figures = finished[1]
  first = data.test_rows.start
  span = (first, first + 40, 16)
  measured = reconstruction.measure(trained, data, *span, 'test')
  for name, value in measured.scalars().items():
    np.testing.assert_allclose(figures[name], value, rtol=1e-6, err_msg=name)
  # Control: the rows that choices are made on score otherwise.
  chosen_on = (data.n_train, data.n_train + 37, 16)
  assert data.validation_rows == range(*chosen_on[:2])
  other = reconstruction.measure(trained, data, *chosen_on, 'validation')
  assert abs(other.fvu / figures['fvu'] - 1) > 1e-3
  # Not the number of predictions that were spliced.
  assert figures['tokens'] == 40 != figures['predictions']
  components = figures['pca_components']
  assert components == round(measured.l0)
  fitted_RD, scored_RD = (
    probed.inputs(trained, data.read_rows(*rows))[0]
    for rows in ((0, data.n_train), span[:2])
  )
  pca = baselines.fit_pca([fitted_RD], components)
  np.testing.assert_allclose(
    figures['fvu_pca'], baselines.pca_fvu(pca, [scored_RD])[-1], rtol=1e-4
  )
  fresh = reconstruction.untrained(trained.config, data.read_rows(0, 60), 1)
  control = reconstruction.measure(fresh, data, *span, 'test')
  np.testing.assert_allclose(figures['fvu_untrained'], control.fvu, rtol=1e-6)
  assert figures['density']['silent'] == (measured.density_N == 0).sum()
  assert sum(figures['density']['latents']) + figures['density']['silent'] == 24


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_no_score_is_of_rows_that_choices_are_made_on(
  parts, tmp_path, monkeypatch, split
):
  """Control: of other test rows there are other scores."""
  trained, data = parts
  chosen = {'validation': data.validation_rows, 'test': data.test_rows}[split]
  mesh = mesh_lib.one_device()

  def scores(folder):
    return report.scores(
      CONFIG, trained, {}, probed.make_subject(), data, str(folder), {}, mesh
    )[1]

  want = scores(tmp_path / 'right')
  finite_rows = data.finite_rows

  def others(start, stop):
    rows_RD = finite_rows(start, stop).copy()
    for row in range(start, stop):
      if row in chosen:
        rows_RD[row - start, :3] += 1
    return rows_RD

  monkeypatch.setattr(data, 'finite_rows', others)
  got = scores(tmp_path / 'other')
  names = ('nmse', 'fvu', 'l0', 'fvu_pca', 'fvu_untrained', 'density')
  same = [got[name] == want[name] for name in names]
  assert all(same) if split == 'validation' else not any(same[:2])


def test_downstream_scores_are_the_functions_own(finished, parts):
  trained, data = parts
  want = downstream.measure(
    trained,
    probed.make_subject(),
    data,
    30,
    data.read_rows(0, 60).mean(0),
  )
  for name, value in dataclasses.asdict(want).items():
    assert finished[1][name] == value
  assert {'delta_ce', 'kl', 'ce_recovered'} <= finished[1].keys()


def test_probes_are_the_functions_own(finished, parts):
  trained, _ = parts
  task = made_tasks(None, 2, 56, 100, 0)[1]
  mesh = mesh_lib.make_mesh(1, 1, jax.devices()[:1])
  prompts = pooled_prompts(trained, mesh, task)
  every = np.arange(trained.config.n_latents)
  pre_PN = pooled.pre_activations(trained, prompts.x_PD, every)
  left, right = tasks.split(task, 0)
  (pre, x, codes, labels), (test_pre, test_x, test_codes, test_labels) = (
    (pre_PN[side], prompts.x_PD[side], prompts.codes_PN[side], labels)
    for side, labels in (
      (left, task.labels_P[left]),
      (right, task.labels_P[right]),
    )
  )
  whole = finished[1]
  assert list(whole['probes']) == ['1_which', '2_again']
  figures = whole['probes']['2_again']
  want = probes.score_task(pre, labels, test_pre, test_labels)
  assert figures['latent'] == pytest.approx(want._asdict(), abs=1e-6)
  assert figures['classes'] == ['one', 'two']
  assert figures['prompts'] == 56
  assert list(whole['control_definitions']) == list(figures['controls'])
  controls = baselines.of_activations(x, labels, test_x, test_labels)
  for name, score in controls.items():
    assert figures['controls'][name] == score._asdict()
  assert list(whole['reference_definitions']) == list(figures['references'])
  assert figures['references'] == references.scores(
    x, codes, labels, test_x, test_codes, test_labels
  )
  assert figures['best_latents'][0] == figures['latent']
  losses = [score['train_ce'] for score in figures['best_latents']]
  assert losses == sorted(losses) and len(losses) == 8


def test_the_workdir_holds_it_all(finished, parts, tmp_path):
  trained, data = parts
  workdir, figures = finished
  assert json.loads((workdir / 'report.json').read_text()) == figures
  table = tables.build(trained, data, str(tmp_path), CONFIG.features, 16)
  read = features_lib.open(workdir / 'features')
  assert read.columns.keys() == table.columns.keys()
  for name in table.columns:
    np.testing.assert_array_equal(read.column(name), table.column(name))
  # Nothing is left of the pass over the store.
  names = {path.name for path in workdir.iterdir()}
  assert not names & {'codes', 'scan'}
  assert read.record['made_from'] == figures['made_from']
  # Nobody asked for them.
  assert 'probe_train_ce' not in read.columns
  assert 'probe_tasks' not in read.record
  for name in ('density', 'reconstruction', 'probes'):
    assert (workdir / 'plots' / f'{name}.png').stat().st_size > 1000
  assert figures['subject'] == 'made' and figures['site'] == str(probed.SITE)
  assert (figures['n_latents'], figures['k'], figures['d_model']) == (24, 4, 16)
  assert figures['n_tokens'] == data.manifest.n_rows
  assert figures['made_from']['step'] == 20


def test_the_page_is_built_from_the_workdir(finished, tmp_path):
  workdir, figures = finished
  index.build_index(
    workdir / 'features',
    figures,
    [f'w{i}' for i in range(probed.VOCABULARY)],
    tmp_path / 'page',
  )
  meta = json.loads((tmp_path / 'page' / 'data' / 'meta.json').read_text())
  assert meta['report']['nmse'] == figures['nmse']
  assert meta['n_features'] == 24


@pytest.mark.parametrize('activation', nonlinearity.NAMES[1:])
def test_every_nonlinearity_is_probed_and_browsed(
  store_url, tmp_path, activation
):
  config = planted.train_config(
    sae=SaeConfig(probed.D_MODEL, 24, 4, activation=activation),
    objective=ObjectiveConfig(k_aux=8, dead_after_tokens=600),
    batch_size=16,
    steps=20,
    sample_rows=60,
  )
  workdir = str(tmp_path / 'run')
  train.train(config, store_url, workdir)
  found = probe(workdir, store_url, tmp_path / 'probe', WHOLE_BATCHES)
  trained = checkpoint.load(workdir)
  data = store_lib.open_store(store_url)

  def active(start, stop):
    x_RD, _ = probed.inputs(trained, data.read_rows(start, stop))
    return probed.latents(trained, x_RD) > 0

  # What fired, and not k.
  first = data.test_rows.start
  l0 = active(first, first + 40).sum(1).mean()
  np.testing.assert_allclose(found['l0'], l0, rtol=0.01)
  assert found['activation'] == activation
  assert found['pca_components'] == min(round(found['l0']), 16)
  table = features_lib.open(tmp_path / 'probe' / 'features')
  every_RN = active(0, data.manifest.n_rows)
  assert abs(table.column('count') - every_RN.sum(0)).sum() <= 2
  # One of each group, unless it is not positive.
  assert np.ptp(every_RN.sum(1)) > (activation != 'groupmax')
  index.build_index(
    tmp_path / 'probe' / 'features',
    found,
    [f'w{i}' for i in range(probed.VOCABULARY)],
    tmp_path / 'page',
  )
  meta = json.loads((tmp_path / 'page' / 'data' / 'meta.json').read_text())
  assert meta['report']['l0'] == found['l0'] and meta['n_features'] == 24


def test_misfits_are_refused(finished, run, tmp_path, store_url):
  def refused(message, url, subject=None):
    with pytest.raises(errors.UserError, match=message):
      probe(run, url, tmp_path / 'none', subject=subject)
    assert not (tmp_path / 'none').exists()

  rows_RD = planted.activations(200)
  planted.write_store(
    str(tmp_path / 'narrow'), 90, rows_RD=rows_RD[:, :12], holdout_documents=1
  )
  refused(
    'width 16, the store holds 12: give the store it was trained on',
    str(tmp_path / 'narrow'),
  )
  probed.write_store(str(tmp_path / 'whole'), heldout=0)
  refused('no held-out rows to score', str(tmp_path / 'whole'))
  probed.write_store(str(tmp_path / 'site'), site='blocks.1.resid_post')
  refused(
    r'trained on blocks.0.resid_post of made \(aaaaaaaa\), the store holds '
    r'blocks.1.resid_post of made',
    str(tmp_path / 'site'),
  )
  probed.write_store(str(tmp_path / 'other'), weights_sha256='b' * 64)
  refused(r'holds blocks.0.resid_post of made \(bbbb', str(tmp_path / 'other'))
  other = dataclasses.replace(probed.make_subject(), weights_sha256='c' * 64)
  refused('not the model that the rows are of', store_url, other)
  # Even where there is nothing left to do.
  with pytest.raises(errors.UserError, match='not the model'):
    probe(run, store_url, finished[0], subject=other)


def test_a_store_that_was_not_trained_on_is_warned_of(
  parts, tmp_path, monkeypatch
):
  warnings = []
  monkeypatch.setattr(
    report.logging, 'warning', lambda text, *args: warnings.append(text % args)
  )
  trained, data = parts
  report.data_lib.of(CONFIG, data.url, trained)
  assert not warnings
  longer = probed.write_store(
    str(tmp_path / 'longer'), (*probed.LENGTHS, (9,)), heldout=9
  )
  report.data_lib.of(CONFIG, longer.url, trained)
  assert 'may have been trained on' in warnings[0]


def test_the_subject_is_the_stores_or_where_the_config_says(
  run, store_url, tmp_path, monkeypatch
):
  asked = []

  def load_recorded(*where):
    asked.append(where)
    raise errors.UserError('not the model')

  monkeypatch.setattr(report.subject_lib, 'load_recorded', load_recorded)
  for name in ('', 'else.gguf'):
    config = dataclasses.replace(CONFIG, subject=name)
    with pytest.raises(errors.UserError, match='not the model'):
      report.probe(config, run, store_url, str(tmp_path / 'none'))
  sha256 = probed.make_subject().weights_sha256
  assert asked == [('made', sha256, ''), ('made', sha256, 'else.gguf')]


def test_options_out_of_range_are_refused():
  for name, value in (('batch_rows', 0), ('eval_rows', -1), ('n_tasks', -1)):
    with pytest.raises(
      errors.UserError, match=f'{name} {value} must be . or more'
    ):
      dataclasses.replace(CONFIG, **{name: value})
  with pytest.raises(
    errors.UserError, match='top_examples 0 must be 1 or more'
  ):
    report.ProbeConfig(features=FeatureConfig(top_examples=0))
  with pytest.raises(errors.UserError, match="pooling 'max' is not known"):
    report.ProbeConfig(pooling='max')
  assert report.ProbeConfig(n_tasks=0, average=False, seed=0).n_tasks == 0


def test_lines_say_the_numbers(finished):
  figures = finished[1]
  text = summary.lines(figures)
  assert len(text) == 5
  for name in ('nmse', 'fvu', 'fvu_pca', 'fvu_untrained'):
    assert f'{figures[name]:.4f}' in text[0]
  assert f'L0 {figures["l0"]:.2f}' in text[1]
  assert f'{100 * figures["dead_fraction"]:.2f}%' in text[1]
  for name in ('delta_ce', 'delta_ce_low', 'delta_ce_high', 'ce', 'kl'):
    assert f'{figures[name]:.4f}' in text[2]
  for line, (name, scored) in zip(text[3:], figures['probes'].items()):
    assert line.startswith(f'{name}: AUC {scored["latent"]["test_auc"]:.3f}')
    assert f'by latent {scored["latent"]["best_latent"]} ' in line
    for control, score in scored['controls'].items():
      assert f'{control} {score["test_auc"]:.3f}' in line
    known = scored['references']
    assert f'logistic {known["logistic"]["test_auc"]:.3f}' in line
    assert f'16-sparse {known["k_sparse"][4]["test_auc"]:.3f})' in line
  # One document gives no interval, and no line that shows one.
  none = {'delta_ce_low': None, 'delta_ce_high': None}
  text = summary.lines(figures | none)
  assert 'nats (no interval of one document) from' in text[2]
  assert 'None' not in text[2]
  # Nor is a number shown that there is none of.
  text = summary.lines(figures | {'nmse': None, 'kl': None})
  assert text[0].startswith('NMSE none  FVU ') and text[2].endswith('KL none')


def test_a_frozen_part_is_named(finished, run, store_url, tmp_path):
  figures = finished[1]
  assert figures['freeze'] == 'none'
  config = runs.saved_config(run)
  plan = dataclasses.replace(config.optimizer, freeze='decoder')
  config = dataclasses.replace(config, steps=2, optimizer=plan)
  train.train(config, store_url, str(tmp_path / 'run'))
  frozen = probe(str(tmp_path / 'run'), store_url, tmp_path / 'probe')
  assert frozen['freeze'] == 'decoder'
  text = summary.lines(frozen)
  assert text[0] == 'a control: the decoder kept its initial weights'
  assert text[1:] == summary.lines(frozen | {'freeze': 'none'})
