"""Plans of the pass over a store that probing makes, as compiled."""

import dataclasses
import re

import pytest

from sae_jax import autoencoder, errors
from sae_jax.autoencoder import SaeConfig
from sae_jax.ops import scopes
from sae_jax.plan import footprint, planner
from sae_jax.plan.steps import probing
from sae_jax.probing.scan import candidates, step
from sae_jax.probing.scan.config import ScanConfig

CONFIG = probing.PassConfig(
  SaeConfig(d_model=128, n_latents=8192, k=4),
  ScanConfig(top_examples=2, random_examples=2, near_examples=2),
  batch_size=256,
  mesh_latent=4,
  positions=8,
)


@pytest.fixture(scope='module')
def compiled(line):
  return footprint.compile_step(CONFIG, line)


def test_all_parts_of_the_pass_are_there(v5e, line, compiled):
  plan = planner.read(CONFIG, v5e, line, compiled)
  tokens, latents, width = 256, 8192 // 4, 128
  assert plan.costs.parts['encoder and top-k'].flops == (
    2 * tokens * latents * width
  )
  # The squares of a device's share of the tokens, of which rows are fitted.
  components = plan.costs.parts[scopes.COMPONENTS]
  assert components.flops == 2 * tokens // 4 * width**2
  # Test rows are scored with the rows of the decoder, others are not.
  assert 'decoder' not in plan.costs.parts
  test = planner.read(CONFIG, v5e, line, compiled, 'test')
  assert test.costs.parts['decoder'].flops > 0
  assert test.roofline == plan.cases['test']
  # Lists that take offers as long as data says are counted.
  assert plan.costs.parts[scopes.TOP].hbm_bytes > 0
  memory = plan.footprint
  assert plan.fits and 0 <= memory.padding < 0.05 * memory.held
  # State and autoencoder are in place: nothing of their size is made anew.
  exchanges = {exchange.kind for exchange in plan.roofline.exchanges}
  assert 'all-to-all' in exchanges


@pytest.mark.parametrize(
  'scope', [scopes.PAIRS, scopes.STATISTICS, scopes.NEAR, scopes.METRICS]
)
def test_a_part_without_its_scope_is_an_error(v5e, line, compiled, scope):
  less = re.sub(rf'(?<=[/(]){scope}(?=[/)])', '', compiled.text)
  assert less != compiled.text
  with pytest.raises(errors.DefectError, match=f'no instruction of: {scope}'):
    planner.read(CONFIG, v5e, line, dataclasses.replace(compiled, text=less))


def test_controls_make_no_codes_of_all_latents(line, monkeypatch):
  """As for the autoencoder itself, what all shards have chooses the kernel."""
  # Of one shard's latents alone, dense codes would be chosen.
  sae = SaeConfig(d_model=128, n_latents=4 * 12_288, k=32)
  config = dataclasses.replace(CONFIG, sae=sae)

  def dense(controls):
    step.make_step.cache_clear()
    of = dataclasses.replace(config, controls=controls)
    text = probing.lowered(of, line, None).as_text()
    return sum('tensor<256x12288xf32>' in row for row in text.splitlines())

  alone = dense(controls=0)
  assert dense(controls=1) == alone
  # A control: encoded as before, they make them.
  monkeypatch.setattr(
    candidates,
    'codes',
    lambda config, sae, x_BD, axis, few: (
      *autoencoder.encode(config, sae, x_BD, axis=axis),
      False,
    ),
  )
  assert dense(controls=1) > alone
  step.make_step.cache_clear()
