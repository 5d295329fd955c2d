"""Parts of compiled steps: each has what it must."""

import dataclasses
import inspect
import re

import pytest

from sae_jax import autoencoder
from sae_jax.autoencoder import preprocessing, SaeConfig
from sae_jax.ops import scopes
from sae_jax.plan import footprint, meshes, planner
from sae_jax.plan.program import parts
from sae_jax.plan.steps import training
from sae_jax.tpu import slices as slices_lib
from sae_jax.training import step
from sae_jax.training.config import TrainConfig
from sae_jax.training.objective import ObjectiveConfig
from sae_jax.training.optimizer import OptimizerConfig


def train_config(objective=None, freeze='none', **kwargs):
  """A step that compiles in seconds."""
  return TrainConfig(
    sae=SaeConfig(**{'d_model': 256, 'n_latents': 2048, 'k': 8} | kwargs),
    objective=objective or ObjectiveConfig(k_aux=8),
    optimizer=OptimizerConfig(freeze=freeze),
    batch_size=384,
  )


@pytest.fixture(scope='module')
def one_chip():
  slices = slices_lib.find('v5e:1x1')
  return slices, meshes.make_mesh(slices, 1, 1)


@pytest.fixture(scope='module')
def compiled(line):
  return footprint.compile_step(train_config(), line, 'dense')


@pytest.mark.parametrize(
  ('config', 'mesh', 'implementation', 'names'),
  [
    (
      train_config(), (1, 4), None,
      'preprocessing, encoder and top-k, encoder gradients, '
      'encoder and decoder, gradients, top-k over shards, AuxK',
    ),
    # Enough latents for the kernels.
    (
      train_config(n_latents=8192), (1, 4), None,
      'preprocessing, encoder and top-k, decoder, encoder and decoder, '
      'gradients, top-k over shards, AuxK',
    ),
    # Not with so wide a code beside it.
    (
      train_config(ObjectiveConfig(multi_topk=4), n_latents=8192), (1, 4), None,
      'preprocessing, encoder and top-k, encoder gradients, '
      'encoder and decoder, gradients, top-k over shards, AuxK',
    ),
    # The latents are in one place.
    (
      train_config(ObjectiveConfig(k_aux=0)), (4, 1), 'gather',
      'preprocessing, encoder and top-k, encoder gradients, decoder, '
      'decoder gradients, encoder and decoder, weight gradients',
    ),
    (
      train_config(ObjectiveConfig(k_aux=0), preprocessing='none'), (4, 1),
      'pallas',
      'encoder and top-k, decoder, encoder and decoder, gradients',
    ),
    (
      train_config(activation='relu'), (1, 4), None,
      'preprocessing, encoder and top-k, encoder gradients, decoder, '
      'decoder gradients',
    ),
    (
      train_config(activation='jumprelu'), (2, 2), None,
      'preprocessing, encoder and top-k, encoder gradients, decoder, '
      'decoder gradients',
    ),
    (
      train_config(activation='batchtopk'), (2, 2), None,
      'preprocessing, encoder and top-k, encoder gradients, decoder, '
      'decoder gradients, AuxK',
    ),
  ],
)  # fmt: skip
def test_what_a_step_must_have_is_known(
  v5e, config, mesh, implementation, names
):
  mesh = meshes.make_mesh(v5e, *mesh)
  present = training.expected(config, mesh, implementation)
  assert present == {parts.OPTIMIZER, *names.split(', ')}


@pytest.mark.parametrize(
  ('config', 'mesh', 'implementation'),
  [
    (train_config(ObjectiveConfig(k_aux=0, multi_topk=2)), (2, 2), 'pallas'),
    (train_config(preprocessing='layer_norm'), (2, 2), 'gather'),
    (train_config(preprocessing='none'), (4, 1), 'dense'),
    (train_config(activation='relu', preprocessing='dataset'), (2, 2), None),
    (train_config(activation='jumprelu'), (1, 4), None),
    (train_config(activation='batchtopk'), (2, 2), None),
    (train_config(freeze='decoder'), (2, 2), 'gather'),
    (train_config(freeze='encoder'), (2, 2), 'dense'),
  ],
)
def test_every_step_has_what_it_must(v5e, config, mesh, implementation):
  mesh = meshes.make_mesh(v5e, *mesh)
  compiled = footprint.compile_step(config, mesh, implementation)
  work = planner.read(config, v5e, mesh, compiled).costs.parts
  assert work[parts.OPTIMIZER].hbm_bytes > 0


@pytest.mark.parametrize(
  ('scope', 'missing'),
  [
    (scopes.PREPROCESSING, 'preprocessing'),
    (scopes.ENCODER, 'encoder and top-k, encoder gradients'),
    (scopes.ENCODER_AND_DECODER, 'encoder and decoder, gradients'),
    (scopes.EXCHANGE, 'top-k over shards'),
    (scopes.AUXK, 'AuxK'),
    (scopes.OPTIMIZER, 'Adam, projection, moving average'),
  ],
)
def test_a_part_that_is_nowhere_is_an_error(
  v5e, line, compiled, scope, missing
):
  # Not where it is a word of another name.
  less = re.sub(rf'(?<=[/(]){scope}(?=[/)])', '', compiled.text)
  assert less != compiled.text
  error = f'has no instruction of: {missing}. '
  with pytest.raises(ValueError, match=re.escape(error)):
    planner.read(
      train_config(), v5e, line, dataclasses.replace(compiled, text=less)
    )


def test_files_and_lines_do_not_matter(v5e, line, compiled):
  moved = re.sub(r'"[^"\n]*\.py"', '"elsewhere.py"', compiled.text)
  moved = re.sub(r' stack_frame_id=\d+', '', moved)
  assert moved != compiled.text and 'sae_jax/' not in moved
  first, second = (
    planner.read(
      train_config(), v5e, line, dataclasses.replace(compiled, text=text)
    ).to_dict()
    for text in (compiled.text, moved)
  )
  assert first == second
  assert len(first['roofline_parts']) > 7


def test_code_that_moves_keeps_its_part_and_without_its_scope_has_none(
  monkeypatch, one_chip
):
  config = train_config(activation='relu')
  slices, mesh = one_chip

  def read(source):
    code = {}
    exec(compile(source, 'elsewhere.py', 'exec'), vars(preprocessing), code)
    monkeypatch.setattr(preprocessing, 'preprocess', code['preprocess'])
    step._program.cache_clear()
    compiled = footprint.compile_step(config, mesh)
    return planner.read(config, slices, mesh, compiled).costs.parts

  source = inspect.getsource(autoencoder.preprocess)
  there = planner.read(
    config, slices, mesh, footprint.compile_step(config, mesh)
  ).costs.parts
  assert there[scopes.PREPROCESSING].hbm_bytes > 0
  assert read(source) == there
  scope = '@jax.named_scope(scopes.PREPROCESSING)\n'
  assert scope in source
  with pytest.raises(ValueError, match='no instruction of: preprocessing'):
    read(source.replace(scope, ''))
  monkeypatch.undo()
  step._program.cache_clear()
