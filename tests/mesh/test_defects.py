"""Defects that other trainers shipped, put back: a test must see each."""

import inspect

import jax
import pytest

from sae_jax.ops import rows
from sae_jax.ops.adam_rows import reference
from sae_jax.ops.top_k import api as top_k_api
from sae_jax.training import auxk, step
from sae_jax.training.objective import loss
from tests.support import (
  objective_checks,
  optimizer_checks,
  step_runs,
  top_k_checks,
)


def edited(module, name, good, bad):
  """A function of a module with another line."""
  source = inspect.getsource(getattr(module, name))
  assert source.count(good) == 1, f'{name} has no such line any more: {good}'
  code = {}
  exec(source.replace(good, bad), vars(module), code)
  return code[name]


def attached_target(*args):
  """Part of a loss whose AuxK moves what it is to model: gradients alone."""
  setting, *_ = args
  value, seen = right_share(*args)
  square = (seen.error_BD**2).sum()
  aux = square / jax.lax.stop_gradient(square)
  return value + setting.config.aux_weight * (aux - 1), seen


def fired_on_first_shard(shards, fired_N):
  """What fired for the tokens of the first shard alone."""
  first = not shards.data_axis or jax.lax.axis_index(shards.data_axis) == 0
  return right_fired(shards, fired_N * first)


right_share, right_fired = loss._share, loss._fired


def gradients():
  objective_checks.gradients_equal_dense_autodiff(1 / 32, 'gather', 0)


def sharded_run():
  config = step_runs.config()
  unsharded = step_runs.run(config, (1, 1))
  step_runs.assert_same_run(step_runs.run(config, (2, 4)), unsharded)


# The check that must see it, and the function that is another, or the line of
# it that is.
DEFECTS = {
  'AuxK: the target is attached': (
    gradients,
    loss,
    '_share',
    attached_target,
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
    loss,
    '_fired',
    fired_on_first_shard,
  ),
  'top-k with a capacity factor': (
    top_k_checks.winners_that_crowd_one_shard_are_kept,
    top_k_api,
    'winners',
    'return own_Bk.sum(-1, dtype=jnp.int32)',
    'return jnp.minimum(own_Bk.sum(-1, dtype=jnp.int32), 2 * k // shards)',
  ),
}


def forget_programs():
  """What is traced from now on uses the functions as they are now."""
  for program in (
    step._program,
    objective_checks.program,
    optimizer_checks.program,
  ):
    program.cache_clear()


@pytest.mark.parametrize('name', DEFECTS)
def test_a_defect_put_back_is_seen(monkeypatch, name):
  check, module, function, *edit = DEFECTS[name]
  (wrong,) = edit if len(edit) == 1 else (edited(module, function, *edit),)
  monkeypatch.setattr(module, function, wrong)
  forget_programs()
  with pytest.raises(AssertionError):
    check()
  # That it passes without the defect is what its own test shows.
  monkeypatch.undo()
  forget_programs()


def test_the_optimizer_uses_what_is_edited():
  # `unit_rows` is looked up when it is used, so that the edit reaches it.
  assert 'rows.unit_rows' in inspect.getsource(reference.adam_rows)
