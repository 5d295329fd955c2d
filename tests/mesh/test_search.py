"""Probes of all latents are the same on every mesh."""

import pickle

import jax
import numpy as np
import pytest

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.probing import newton, pooled, search
from tests.support import probed, processes, task_search

N_LATENTS = 296


@pytest.fixture(scope='module', autouse=True)
def small_blocks():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(newton, 'columns', lambda: 16)
    patch.setattr(search, '_CPU_BLOCKS', 2)
    yield


@pytest.fixture(scope='module')
def want(small_blocks):
  return task_search.search_all(1, 1, N_LATENTS)


# Of 296 latents a device has 37, not whole blocks; of 2x4 they are split over
# the data axis too, and of 3x2 they are not.
@pytest.mark.parametrize('data, latent', [(1, 8), (2, 4), (3, 2)])
def test_meshes_agree(want, data, latent):
  assert [task.latent.latent_Q[0] for task in want] == list(task_search.KNOW)
  for one, other in zip(task_search.search_all(data, latent, N_LATENTS), want):
    for kind, same in zip(one[:3], other[:3]):
      np.testing.assert_array_equal(kind.latent_Q, same.latent_Q)
      for values_Q, same_Q in zip(kind.probes_Q, same.probes_Q):
        np.testing.assert_allclose(values_Q, same_Q, rtol=1e-5, atol=1e-6)
    assert one.train_ce_N.shape == (N_LATENTS,)
    np.testing.assert_allclose(one.train_ce_N, other.train_ce_N, atol=1e-6)
  assert len(one.train_ce_N.sharding.device_set) == data * latent


def test_two_processes_agree(want, tmp_path):
  code = (
    'import sys; from tests.support import task_search as t; '
    't.search_and_score(sys.argv[1])'
  )
  processes.run_two(code, [tmp_path / '0', tmp_path / '1'])
  for number in '01':
    parts, pre_PQ = pickle.loads((tmp_path / number).read_bytes())
    for one, other in zip(parts, want):
      for kind, same in zip(one, other):
        np.testing.assert_array_equal(kind.latent_Q, same.latent_Q)
        np.testing.assert_allclose(
          kind.probes_Q.train_ce_N, same.probes_Q.train_ce_N, atol=1e-6
        )
    assert pre_PQ.shape == (100, 4)


def test_numbers_within_a_shard_would_not_do(want, monkeypatch):
  start = search._Layout.start
  monkeypatch.setattr(
    search._Layout, 'start', lambda self: (start(self)[0], start(self)[0])
  )
  # Of another number, so that the program is not one that was compiled before.
  wrong = task_search.search_all(1, 8, N_LATENTS, n_best=3)
  assert not all(
    np.array_equal(one.random.latent_Q, other.random.latent_Q[:3])
    for one, other in zip(wrong, want)
  )


def test_a_mesh_that_does_not_divide_the_latents_is_refused():
  with pytest.raises(
    errors.UserError, match='n_latents 300 must be a multiple'
  ):
    task_search.search_all(1, 8, 300)


@pytest.mark.parametrize('activation', ['topk', 'relu'])
def test_pooled_codes_agree(tmp_path, activation):
  made = probed.make_trained(
    probed.write_store(str(tmp_path / 'store')), activation=activation
  )
  prompts = ['w1 w2 w3', 'w4', 'w5 w6 w7 w8 w9']
  codes = []
  for data, latent in ((1, 1), (2, 4)):
    mesh = mesh_lib.make_mesh(data, latent, jax.devices()[: data * latent])
    read = pooled.pool(
      pooled.on_mesh(made, mesh),
      mesh,
      probed.make_subject(),
      str(probed.SITE),
      prompts,
      20,
      'mean',
      '',
    )
    codes.append(read.codes_PN.toarray())
  assert (codes[0] > 0).sum() > 5
  np.testing.assert_allclose(codes[1], codes[0], atol=1e-6)
