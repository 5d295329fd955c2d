"""The one-pass optimiser kernel: its cores do not race."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from sae_jax.ops.adam_rows import kernel
from tests.support.adam_runs import CONFIG, problem, SMALL


def strict():
  return pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory='nan',
    out_of_bounds_reads='raise',
    num_cores_or_threads=2,
  )


def strict_step(n):
  """What the strict interpreter and the plain one make of a step."""
  state, grads = problem(n, 128)
  scalars = jnp.array([0.01, 2.0, 3.0, 0.5, 1.0], jnp.float32)
  return [
    kernel.adam_rows(
      scalars,
      *state,
      grads[0],
      guarded=True,
      tile=SMALL,
      interpret=interpret,
      **CONFIG,
    )
    for interpret in (strict(), True)
  ]


def test_cores_do_not_race(races):
  got, want = strict_step(32)
  assert not races()
  jax.tree.map(np.testing.assert_array_equal, got[:4], want[:4])
  np.testing.assert_allclose(got[4], want[4], rtol=1e-6)


def test_rows_past_the_last_are_not_counted(races, monkeypatch):
  # The strict interpreter of jax 0.10 returns an output that lies over its
  # input with the padding of a ragged block: they lie apart here.
  call = pl.pallas_call
  monkeypatch.setattr(
    pl,
    'pallas_call',
    lambda *args, input_output_aliases=None, **more: call(*args, **more),
  )
  got, want = strict_step(21)
  assert not races()
  # What lies past the last row is NaN in it.
  assert np.isfinite(got[4])
  jax.tree.map(np.testing.assert_array_equal, got[:4], want[:4])

  def norm():
    (p_ND, *_), grads = problem(21, 128)
    return kernel.squared_norm(p_ND, grads[0], tile=SMALL, interpret=strict())

  np.testing.assert_allclose(norm(), got[4], rtol=1e-6)
  # Control: counting them is seen.
  monkeypatch.setattr(
    kernel, '_squares', lambda g_GD, _: (g_GD**2).sum(-1, keepdims=True)
  )
  assert np.isnan(norm())


def test_control_a_sum_that_cores_share_is_a_race(races, monkeypatch):
  monkeypatch.setattr(
    kernel, '_partial_block', lambda: pl.BlockSpec((8, 128), lambda i: (0, 0))
  )
  try:
    strict_step(32)
    raced = races()
  except jax.errors.JaxRuntimeError as error:
    # jax 0.12 raises where 0.10 takes note.
    raced = 'RACE DETECTED' in str(error)
  assert raced
