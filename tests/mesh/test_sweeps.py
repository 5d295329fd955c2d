"""Many runs from one reading, on a mesh: each is the run it would be alone."""

import pathlib

import jax
import numpy as np
import pytest

from sae_jax import checkpoint
from sae_jax.training import train
from tests.support import planted, runs


def members(folder):
  """Runs that differ in one field each, by workdir."""
  base = planted.train_config()
  found = {}
  for field, value in (
    ('k', 4),
    ('k', 2),
    ('seed', 1),
    ('learning_rate', 1e-2),
    ('n_latents', 128),
    ('activation', 'relu'),
  ):
    found |= train.sweep(base, str(folder), **{field: [value]})
  return found


@pytest.fixture(scope='module')
def alone(store, tmp_path_factory):
  """Each member trained by itself, by its folder's name."""
  folder = tmp_path_factory.mktemp('alone')
  found = {}
  for workdir, config in members(folder).items():
    train.train(config, store, workdir)
    found[pathlib.Path(workdir).name] = workdir
  return found


def assert_as_alone(configs, alone):
  for workdir in configs:
    runs.assert_same_run(workdir, alone[pathlib.Path(workdir).name])


def test_members_of_a_sweep_are_the_runs_they_would_be_alone(
  store, alone, tmp_path
):
  configs = members(tmp_path)
  with runs.batches_seen() as seen:
    states = train.train_many(configs, store)
  assert [step for step, _ in seen] == list(range(30))
  assert_as_alone(configs, alone)
  for workdir, state in states.items():
    runs.assert_same_bits(
      jax.tree.map(np.asarray, state),
      jax.tree.map(np.asarray, runs.saved_state(workdir)),
    )
  # Control: they are different runs.
  assert len({runs.log(workdir) for workdir in alone.values()}) == 6


def test_a_sweep_catches_up_with_members_at_different_steps(
  store, alone, tmp_path
):
  configs = members(tmp_path)
  some = list(configs)
  runs.break_off(17, configs, store)
  assert {checkpoint.load(workdir).step for workdir in some} == {10}
  # One goes on alone to its end, one to a later checkpoint, one starts over.
  train.train(configs[some[0]], store, some[0])
  runs.break_off(27, {some[1]: configs[some[1]]}, store)
  for path in pathlib.Path(some[2], 'checkpoints').iterdir():
    path.rename(tmp_path / f'gone{path.name}')
  at = [runs.saved_steps(workdir)[-1:] for workdir in some[:4]]
  assert at == [[30], [20], [], [10]]
  with runs.batches_seen() as seen:
    train.train_many(configs, store)
  assert [step for step, _ in seen] == list(range(30))
  assert_as_alone(configs, alone)
