"""sae-probe --stream: the report and the table of a store of the same text."""

import dataclasses
import json

import numpy as np
import pytest

from sae_jax import checkpoint, errors, features
from sae_jax import mesh as mesh_lib
from sae_jax.feed import text_rows
from sae_jax.probing import data as data_lib
from sae_jax.probing import report, tasks
from sae_jax.probing.scan import run as scan_lib
from tests.support import pipeline, runs, toy

STREAM = dataclasses.replace(pipeline.PROBE, stream=True)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """The folder of a store, of a run on it, and of what the store gives."""
  folder = tmp_path_factory.mktemp('made')
  texts = toy.write_texts(folder)
  pipeline.harvested(texts, str(folder / 'store'))
  pipeline.trained(str(folder / 'store'), str(folder / 'run'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, 'load_tasks', pipeline.made_tasks)
    probe(folder, folder / 'stored', pipeline.PROBE, str(folder / 'store'))
  return folder


@pytest.fixture(scope='module')
def streamed(made):
  """The workdir of a stream that nothing stopped."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, 'load_tasks', pipeline.made_tasks)
    probe(made, made / 'streamed')
  return made / 'streamed'


@pytest.fixture(autouse=True)
def without_the_package(monkeypatch):
  monkeypatch.setattr(tasks, 'load_tasks', pipeline.made_tasks)


def probe(made, workdir, config=STREAM, store=None, subject=None):
  subject = subject or toy.subject()
  return report.probe(config, str(made / 'run'), store, str(workdir), subject)


def results(workdir):
  """The report but for what it is made from, and the columns of the table."""
  figures = json.loads((workdir / 'report.json').read_text())
  del figures['made_from']
  table = features.open(workdir / 'features')
  return figures, {name: table.column(name) for name in table.columns}


def assert_same(got, want):
  assert got[0] == want[0]
  assert got[1].keys() == want[1].keys()
  runs.assert_same_bits(got[1], want[1])


def test_it_gives_what_a_store_of_the_text_gives(made, streamed):
  got = results(streamed)
  assert got[0]['n_tokens'] == 1000
  assert_same(got, results(made / 'stored'))
  # What only the pass needs is gone.
  assert {path.name for path in streamed.iterdir()} == {
    path.name for path in (made / 'stored').iterdir()
  }
  # Finished results are reused; those of other text are other results.
  assert probe(made, streamed)['fvu'] == got[0]['fvu']
  for change in ({'n_tokens': 2000}, {'holdout_fraction': 0.3}):
    with pytest.raises(errors.UserError, match='results of other inputs'):
      probe(made, streamed, dataclasses.replace(STREAM, **change))


def test_a_row_that_is_another_is_seen(made, tmp_path, monkeypatch):
  """A control: one row of the middle of the text is the one after it."""
  whole = text_rows.TextRows._read_shard

  def shifted(self, number):
    shard = whole(self, number)
    if number == 2:
      shard.offset_R[7] += 1
    return shard

  monkeypatch.setattr(text_rows.TextRows, '_read_shard', shifted)
  probe(made, tmp_path)
  got, want = results(tmp_path), results(made / 'stored')
  assert got[0]['n_tokens'] == want[0]['n_tokens']
  assert not np.array_equal(got[1]['mean'], want[1]['mean'])


def test_one_that_was_stopped_ends_with_the_same_bytes(
  made, streamed, tmp_path, monkeypatch
):
  scan, computed = scan_lib.scan, []

  def killed(done):
    if done == 5:
      raise runs.Stop

  with monkeypatch.context() as patch:
    patch.setattr(scan_lib, 'scan', lambda *args: scan(*args, asked=killed))
    often = dataclasses.replace(STREAM, save_every_rows=128)
    with pytest.raises(runs.Stop):
      probe(made, tmp_path / 'killed', often)
  on_devices = text_rows.TextRows.on_devices

  def noted(self, start, *args, **kwargs):
    computed.append(start)
    return on_devices(self, start, *args, **kwargs)

  monkeypatch.setattr(text_rows.TextRows, 'on_devices', noted)
  probe(made, tmp_path / 'killed')
  # The rows that the run was fitted to, then those that are left.
  sample = list(range(0, 500, pipeline.PROBE.batch_rows))
  assert computed[: len(sample)] == sample
  assert min(computed[len(sample) :]) == 256
  assert pipeline.files(tmp_path / 'killed') == pipeline.files(streamed)


def test_what_is_asked_for_is_checked_before_anything_is_read(made, tmp_path):
  def refused(message, config=STREAM, store=None, **kwargs):
    with pytest.raises(errors.UserError, match=message):
      probe(made, tmp_path / 'none', config, store, **kwargs)
    assert not (tmp_path / 'none').exists()

  refused('--store and --stream are both given', store=str(made / 'store'))
  refused('--store is required, or --stream', pipeline.PROBE)
  for change in (
    {'sources': ('a.txt',)},
    {'n_tokens': 10},
    {'tokenizer_workers': 1},
    {'skip_bad_rows': True},
  ):
    (name,) = change
    with pytest.raises(errors.UserError, match=f'{name} is for --stream'):
      dataclasses.replace(pipeline.PROBE, **change)
    assert getattr(dataclasses.replace(STREAM, **change), name)
  no_text = dataclasses.replace(STREAM, sources=(str(tmp_path / 'no.txt'),))
  refused('no.txt', no_text)
  other = dataclasses.replace(toy.subject(), weights_sha256='c' * 64)
  refused(
    'not the model that the rows are of: use toy as it was', subject=other
  )
  control = dataclasses.replace(STREAM, controls=(str(made / 'none'),))
  refused('no checkpoints under', control)


@pytest.mark.parametrize(
  ('change', 'dataset', 'streamed', 'warns'),
  [
    ({}, {}, False, False),
    ({}, {}, True, False),
    # Rows that were trained on are held out of less text, or of a larger share.
    ({'n_tokens': 2900}, {}, False, True),
    ({'holdout_fraction': 0.3}, {}, False, True),
    ({'holdout_fraction': 0.05}, {}, False, False),
    # Of more text than the store had a streamed run has read what follows.
    ({}, {'n_rows': 2000, 'holdout_rows': 200}, False, False),
    ({}, {'n_rows': 2000, 'holdout_rows': 200}, True, True),
    ({}, {'corpus': {'texts': 'others'}}, False, True),
  ],
)
def test_text_that_may_have_been_trained_on_is_warned_of(
  made, tmp_path, caplog, change, dataset, streamed, warns
):
  trained = checkpoint.load(str(made / 'run'))
  trained.metadata.train_config['stream'] = streamed
  trained.metadata.dataset.update(dataset)
  config = dataclasses.replace(STREAM, **change)
  data = data_lib.of(config, None, trained)
  rows = data.open(toy.subject(), str(tmp_path), mesh_lib.one_device())
  assert rows.test_rows
  assert ('may have been trained on' in caplog.text) == warns
