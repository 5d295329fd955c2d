"""The suite on meshes: the figures of one device."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax.probing.scan import run as scan_lib
from sae_jax.probing.suite import evaluations, figures
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.evaluations import refinement
from tests.support import probed, processes, spelled, suites

# How much each measures here; of the others what the quick size has.
SIZES = {
  'absorption': {'words': 260, 'steps': 20, 'batch_words': 64},
  'ablation': {'ablations': 2},
  'attribution': {'ablations': 2},
  'downstream': {'tokens': 40},
  'effects': {'latents': 1, 'examples': 2},
  'error': {'fitted_rows': 200, 'rows': 30, 'batch_rows': 64},
  'neurons': {'latents': 4, 'rows': 200, 'batch_rows': 30},
  'n2g': {'latents': 1, 'tokens': 200, 'examples': 2},
  'projections': {'rows': 30},
  'recovery': {'rows': 30, 'batch_rows': 32},
  'refinement': {'rows': 30, 'batch_rows': 32},
  'simulated': {'latents': 1, 'tokens': 200, 'examples': 2},
  'steering': {'latents': 1, 'prompts': 2, 'prompt_tokens': 4, 'new_tokens': 2},
  'structure': {'matched': 64, 'meta_steps': 10},
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return suites.write_store(str(tmp_path_factory.mktemp('suite') / 'store'))


@pytest.fixture(scope='module')
def trained(data):
  return probed.make_trained(data)


def context_on(mesh, trained, data):
  scored = {
    name: dataclasses.replace(of, sae=scan_lib.on_mesh(of.sae, mesh))
    for name, of in suites.everything(
      trained, data, mesh_lib.one_device()
    ).items()
  }
  x_BD, _ = probed.inputs(trained, data.read_rows(0, data.n_train))
  z_BN = probed.latents(trained, x_BD)

  def top_rows(latents):
    order = np.argsort(-z_BN[:, latents], 0, kind='stable')[:3].T
    return np.where(
      np.take_along_axis(z_BN.T[latents], order, 1) > 0, order, -1
    )

  return suites.context(
    trained,
    data,
    mesh,
    scored,
    counts_N=(z_BN > 0).sum(0),
    max_N=z_BN.max(0).astype(np.float32),
    top_rows=top_rows,
  )


def values(evaluation, context):
  """All figures by name and by what is scored."""
  if evaluation.__name__.endswith('absorption'):
    # Of a subject that knows letters.
    trained = spelled.make_trained(True, mesh=context.mesh)
    scored = {'trained': scored_lib.of(trained, context.mesh, 64)}
    context = dataclasses.replace(
      context, subject=spelled.make_subject(), scored=scored
    )
  outcome = evaluation.measure(context)
  return {
    (name, who): figures.figure(statistic, sample).value
    for name, statistic in evaluation.STATISTICS.items()
    for who, sample in outcome.samples.items()
  }


def small(name, patch):
  """An evaluation that measures little."""
  evaluation = evaluations.of(name)
  suites.shrink(patch, evaluation, **SIZES[name])
  if hasattr(evaluation, 'TOKENS'):
    patch.setattr(evaluation, 'TOKENS', 3)
  return evaluation


@pytest.fixture(scope='module')
def want(data, trained):
  """The figures of one device."""
  context = context_on(mesh_lib.one_device(), trained, data)
  with pytest.MonkeyPatch.context() as patch:
    return {name: values(small(name, patch), context) for name in SIZES}


def assert_near(got, want):
  assert set(got) == set(want)
  for key, value in want.items():
    for one, other in zip(np.atleast_1d(got[key]), np.atleast_1d(value)):
      if other is None:
        assert one is None, key
      else:
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize('shape', [(1, 8), (8, 1)])
def test_figures_do_not_depend_on_the_mesh(
  data, trained, want, shape, monkeypatch
):
  """Two whose latents are chosen and read over all shards.

  The others are tried on a mesh by the two processes below.
  """
  context = context_on(mesh_lib.make_mesh(*shape), trained, data)
  for name in ('recovery', 'refinement'):
    assert_near(values(small(name, monkeypatch), context), want[name])


def test_a_shard_s_own_latents_alone_would_show(
  data, trained, want, monkeypatch
):
  """Control: without what other shards have, figures are others."""
  monkeypatch.setattr(
    scored_lib,
    '_of_all_shards',
    lambda vals_BC, idx_BC, n_own, width: scored_lib._best(
      vals_BC, idx_BC, width
    ),
  )
  context = context_on(mesh_lib.make_mesh(1, 8), trained, data)
  got = values(small('projections', monkeypatch), context)
  assert_near(got, want['projections'])
  # Another function, which is traced anew.
  own = refinement._terms.__wrapped__
  terms = jax.jit(lambda *args: own(*args), static_argnums=0)
  monkeypatch.setattr(refinement, '_terms', terms)
  with pytest.raises(AssertionError):
    got = values(small('refinement', monkeypatch), context)
    assert_near(got, want['refinement'])


def measure_in_a_process(url):
  """All figures, as one of two processes; prints them."""
  data = store_lib.open_store(url)
  context = context_on(
    mesh_lib.make_mesh(2, 4), probed.make_trained(data), data
  )
  with pytest.MonkeyPatch.context() as patch:
    out = {
      name: [
        [*key, value] for key, value in values(evaluation, context).items()
      ]
      for name in SIZES
      for evaluation in [small(name, patch)]
    }
  print(json.dumps(out))


def test_two_processes_give_what_one_does(data, want):
  code = 'import sys; from tests.mesh import test_suite as t; '
  code += 't.measure_in_a_process(sys.argv[1])'
  printed = processes.run_two(code, [data.url] * 2, timeout=800)
  both = [json.loads(of.splitlines()[-1]) for of in printed]
  assert both[0] == both[1]
  for name, rows in both[0].items():
    got = {(figure, who): value for figure, who, value in rows}
    assert_near(got, want[name])


def test_every_evaluation_is_tried_on_a_mesh():
  # What tasks have is read from the report, and concepts are read from the
  # store and encoded as rows are: both on the host beside that.
  assert set(evaluations.NAMES) == {*SIZES, 'probes', 'completeness'}
