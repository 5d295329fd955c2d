"""Work in other processes: order, errors, a death; the page's blocks there."""

import os
import signal

import pytest

from sae_jax import errors
from sae_jax import processes as processes_lib
from sae_jax.browser import index
from sae_jax.features import writer
from tests.support import processes, synthetic_features

HERE = 'tests.process.test_processes'


def adder(number):
  """What the processes of these tests call with each job."""

  def add(job):
    if job == 'fail':
      raise errors.UserError('three cannot be added: use two')
    if job == 'die':
      os.kill(os.getpid(), signal.SIGKILL)
    return number + job

  return add


def work(place='adder'):
  return processes_lib.Work(f'{HERE}:{place}', 100, 'adding process', 'use one')


@pytest.mark.parametrize('count', [1, 3])
def test_results_come_in_the_order_of_the_jobs(count):
  before = processes.children()
  jobs = ((f'job {i}', i) for i in range(20))
  results = list(processes_lib.run(work(), jobs, count))
  assert results == [(f'job {i}', 100 + i) for i in range(20)]
  assert processes.children() == before


@pytest.mark.parametrize(
  ('place', 'job', 'said'),
  [
    ('adder', 'fail', 'three cannot be added: use two'),
    ('adder', 'die', 'adding process 2 of 2 was ended by SIGKILL, .* use one'),
    ('none', 1, 'none'),
  ],
)
def test_a_job_that_fails_ends_them_all(place, job, said):
  before = processes.children()
  jobs = [(0, 1), (1, job), (2, 3)]
  with pytest.raises((errors.UserError, AttributeError), match=said):
    list(processes_lib.run(work(place), jobs, 2))
  assert processes.children() == before


def test_the_page_that_processes_make_is_the_same(tmp_path, monkeypatch):
  features, report, vocabulary = synthetic_features.make(
    n_latents=60, n_examples=3, window=8, n_tokens=2000
  )
  writer.write(tmp_path / 'features', features)
  config = index.BrowseConfig(features_per_shard=7)

  def build(name, vocabulary=vocabulary):
    index.build_index(
      tmp_path / 'features', report, vocabulary, tmp_path / name, config
    )
    return {
      str(path.relative_to(tmp_path / name)): path.read_bytes()
      for path in (tmp_path / name).rglob('*.*')
    }

  here = build('here')
  monkeypatch.setattr(index, '_FEW', 0)
  monkeypatch.setattr(index, '_BLOCK', 14)
  started = []
  run = processes_lib.run

  def counted(*arguments):
    started.append(arguments[-1])
    return run(*arguments)

  monkeypatch.setattr(processes_lib, 'run', counted)
  assert build('there') == here and started
  with pytest.raises(errors.UserError, match='but the vocabulary ends at 9'):
    build('short', vocabulary[:10])
  assert not (tmp_path / 'short' / 'finished.json').exists()
