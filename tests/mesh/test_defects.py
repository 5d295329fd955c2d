"""Defects that other trainers shipped, put back: a test must see each."""

import inspect

import pytest

from sae_jax.ops import rows
from sae_jax.ops.adam_rows import reference
from sae_jax.ops.top_k import api as top_k_api
from sae_jax.training import auxk, objective, step
from tests.support import (
  objective_checks,
  optimizer_checks,
  step_runs,
  top_k_checks,
)


def put_back(monkeypatch, module, name, good, bad):
  """Edits a line of a function of a module, for the module and its users."""
  function = getattr(module, name)
  source = inspect.getsource(function)
  assert source.count(good) == 1, f'{name} has no such line any more: {good}'
  code = {}
  exec(source.replace(good, bad), vars(module), code)
  monkeypatch.setattr(module, name, code[name])
  step._program.cache_clear()


def gradients():
  objective_checks.gradients_equal_dense_autodiff(1 / 32, 'gather', 0)


def sharded_run():
  config = step_runs.config()
  unsharded = step_runs.run(config, (1, 1))
  step_runs.assert_same_run(step_runs.run(config, (2, 4)), unsharded)


DEFECTS = {
  'AuxK: the target is attached': (
    gradients,
    objective,
    'value_and_grad',
    '    return total / tokens, (sums, jax.lax.stop_gradient(error_BD), short)',
    '    norm = jax.lax.stop_gradient((error_BD**2).sum())\n'
    '    aux = config.aux_weight * (error_BD**2).sum() / norm\n'
    '    return total / tokens + aux, (sums, error_BD, short)',
  ),
  "AuxK: the encoder's gradient is dropped": (
    gradients,
    auxk,
    'aux_error',
    '      rows.w_enc_MD,\n',
    '      jax.lax.stop_gradient(rows.w_enc_MD),\n',
  ),
  'unit norm along the wrong axis': (
    optimizer_checks.updates_equal_a_float64_loop,
    rows,
    'unit_rows',
    'axis=-1',
    'axis=0',
  ),
  'dead latents counted by each data shard': (
    sharded_run,
    objective,
    'value_and_grad',
    '    fired_N=split.over_tokens(sums.fired_N) > 0,',
    '    fired_N=split.over_tokens(sums.fired_N * (not data_axis or '
    'jax.lax.axis_index(data_axis) == 0)) > 0,',
  ),
  'top-k with a capacity factor': (
    top_k_checks.winners_that_crowd_one_shard_are_kept,
    top_k_api,
    'winners',
    'return own_Bk.sum(-1, dtype=jnp.int32)',
    'return jnp.minimum(own_Bk.sum(-1, dtype=jnp.int32), 2 * k // shards)',
  ),
}


@pytest.mark.parametrize('name', DEFECTS)
def test_a_defect_put_back_is_seen(monkeypatch, name):
  check, *edit = DEFECTS[name]
  put_back(monkeypatch, *edit)
  with pytest.raises(AssertionError):
    check()
  monkeypatch.undo()
  step._program.cache_clear()
  # Without it the same check passes.
  check()


def test_the_optimizer_uses_what_is_edited():
  # `unit_rows` is looked up when it is used, so that the edit reaches it.
  assert 'rows.unit_rows' in inspect.getsource(reference.adam_rows)
