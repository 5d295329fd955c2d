"""The report: each number is its function's own, and misfits are refused."""

import dataclasses
import json

import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax import store as store_lib
from sae_jax.autoencoder import nonlinearity, SaeConfig
from sae_jax.browser import index
from sae_jax.features import table as table_lib
from sae_jax.probing import (
  baselines,
  downstream,
  examples,
  pooled,
  probes,
  reconstruction,
  report,
  summary,
  tasks,
)
from sae_jax.probing.examples import FeatureConfig
from sae_jax.training import train
from sae_jax.training.objective import ObjectiveConfig
from tests.support import planted, probed, runs
from tests.support.reports import CONFIG, made_tasks, probe, WHOLE_BATCHES


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
    assert figures[name] == value
  # Control: the rows that choices are made on score otherwise.
  chosen_on = (data.n_train, data.n_train + 37, 16)
  assert data.validation_rows == range(*chosen_on[:2])
  other = reconstruction.measure(trained, data, *chosen_on, 'validation')
  assert abs(other.fvu / figures['fvu'] - 1) > 1e-3
  # Not the number of predictions that were spliced.
  assert figures['tokens'] == 40 != figures['predictions']
  components = figures['pca_components']
  assert components == round(measured.l0)
  assert figures['fvu_pca'] == reconstruction.pca_fvu(
    trained, data, *span[:2], components, 16
  )
  fresh = reconstruction.untrained(trained.config, data.read_rows(0, 60), 1)
  control = reconstruction.measure(fresh, data, *span, 'test')
  assert figures['fvu_untrained'] == control.fvu
  assert figures['density']['silent'] == (measured.density_N == 0).sum()
  assert sum(figures['density']['latents']) + figures['density']['silent'] == 24


def test_no_score_reads_a_row_that_choices_are_made_on(parts, monkeypatch):
  trained, data = parts
  read, finite_rows = [], data.finite_rows

  def recorded(start, stop):
    read.append(range(start, stop))
    return finite_rows(start, stop)

  monkeypatch.setattr(data, 'finite_rows', recorded)
  report.scores(CONFIG, trained, probed.make_subject(), data)
  n_test = 0
  for rows in read:
    # The sample and the fit of components are of training rows.
    if rows.stop > data.n_train:
      assert rows.start >= data.test_rows.start
      n_test += len(rows)
  # By the autoencoder, an untrained one and principal components.
  assert n_test == 3 * 40


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
  x_PD = pooled.pooled_inputs(
    trained,
    probed.make_subject(),
    str(probed.SITE),
    list(task.prompts),
    64,
    'mean',
    '',
  )
  pre_PN = pooled.pre_activations(trained, x_PD)
  left, right = tasks.split(task, 0)
  sides = [
    (pre_PN[side], x_PD[side], task.labels_P[side]) for side in (left, right)
  ]
  (pre, _, labels), (test_pre, _, test_labels) = sides
  want = probes.score_task(pre, labels, test_pre, test_labels)
  figures = finished[1]['probes']
  assert list(figures) == ['1_which', '2_again']
  assert figures['2_again']['latent'] == want._asdict()
  assert figures['2_again']['classes'] == ['one', 'two']
  assert figures['2_again']['prompts'] == 56
  controls = baselines.controls(*sides[0], *sides[1])
  assert list(finished[1]['control_definitions']) == list(controls)
  assert figures['2_again']['controls'] == {
    name: score._asdict() for name, score in controls.items()
  }


def test_the_workdir_holds_it_all(finished, parts):
  trained, data = parts
  workdir, figures = finished
  assert json.loads((workdir / 'report.json').read_text()) == figures
  table = examples.build(
    CONFIG.features, trained, probed.make_subject(), data, 16, 0
  )
  read = table_lib.read(workdir / 'features.npz')
  assert read.keys() == table.keys()
  for name, array in table.items():
    np.testing.assert_array_equal(read[name], array)
  for name in ('density', 'reconstruction', 'probes'):
    assert (workdir / 'plots' / f'{name}.png').stat().st_size > 1000
  assert figures['subject'] == 'made' and figures['site'] == str(probed.SITE)
  assert (figures['n_latents'], figures['k'], figures['d_model']) == (24, 4, 16)
  assert figures['n_tokens'] == data.manifest.n_rows
  assert figures['made_from']['step'] == 20


def test_the_page_is_built_from_the_workdir(finished, tmp_path):
  workdir, figures = finished
  index.build_index(
    workdir / 'features.npz',
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
  table = table_lib.read(tmp_path / 'probe' / 'features.npz')
  every_RN = active(0, data.manifest.n_rows)
  assert abs(table['count'] - every_RN.sum(0)).sum() <= 2
  assert np.ptp(every_RN.sum(1)) > 1
  index.build_index(
    tmp_path / 'probe' / 'features.npz',
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
  refused('not the model store .* was harvested from', store_url, other)
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
  report.check(trained, data)
  assert not warnings
  longer = probed.write_store(
    str(tmp_path / 'longer'), (*probed.LENGTHS, (9,)), heldout=9
  )
  report.check(trained, longer)
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
