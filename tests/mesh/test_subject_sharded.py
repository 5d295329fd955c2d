"""Subjects over a mesh, in bfloat16, and saved with Orbax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from orbax import checkpoint as ocp
import pytest

from sae_jax import errors, subject
from sae_jax import mesh as mesh_lib
from sae_jax.storage import orbax as orbax_lib
from sae_jax.subject import capture, generate, sharding
from sae_jax.subject.formats import saved
from tests.support import hf_folder
from tests.support.subject_models import CONFIGS, LLAMA, params_of, TOKENS

SITES = ('blocks.1.attn_out', 'blocks.1.mlp_act', 'blocks.2.resid_post')


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens_BT):
  record = tuple(capture.parse_site(name) for name in SITES)
  out = capture.run(config, params, tokens_BT, record=record, logits=True)
  return [out.logits_BTV, *(out.recorded[site] for site in record)]


def put(params, config, mesh):
  return jax.device_put(params, sharding.param_shardings(config, mesh))


@pytest.mark.parametrize(
  'family, data, latent', [('gemma', 2, 2), ('neox', 2, 4)]
)
def test_a_mesh_changes_nothing(family, data, latent):
  config, params = CONFIGS[family], params_of(family)
  mesh = mesh_lib.make_mesh(data, latent, jax.devices()[: data * latent])
  spread = put(params, config, mesh)
  tokens = jax.device_put(TOKENS, sharding.tokens_sharding(mesh))
  alone = run(config, params, TOKENS)
  together = run(config, spread, tokens)
  for a, b in zip(alone, together):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
  # A parameter that lay wrongly would show.
  wrong = spread | {'embed': jnp.roll(spread['embed'], 1, 0)}
  assert np.abs(run(config, wrong, tokens)[0] - alone[0]).max() > 0.1


def test_which_parameters_are_sharded():
  mesh = mesh_lib.make_mesh(4, 2, jax.devices())
  spread = put(params_of('llama'), LLAMA, mesh)
  blocks = spread['blocks']

  def share(x):
    return x.addressable_shards[0].data.size / x.size

  for name in ('query', 'key', 'value', 'attn_out', 'gate', 'up', 'down'):
    assert share(blocks[name]) == 1 / 2
  assert share(blocks['attn_norm']) == 1
  # 61 tokens cannot be halved, nor the two key-value heads quartered.
  assert share(spread['embed']) == 1
  even = dataclasses.replace(LLAMA, vocab_size=64)
  shardings = sharding.param_shardings(even, mesh)
  assert tuple(shardings['embed'].spec) == ('latent', None)
  mesh = mesh_lib.make_mesh(2, 4, jax.devices())
  shardings = sharding.param_shardings(LLAMA, mesh)['blocks']
  for name, sharded in (('key', False), ('query', False), ('up', True)):
    assert ('latent' in tuple(shardings[name].spec)) == sharded


def test_generation_over_a_mesh():
  mesh = mesh_lib.make_mesh(2, 2, jax.devices()[:4])
  spread = put(params_of('llama'), LLAMA, mesh)
  tokens = jax.device_put(TOKENS, sharding.tokens_sharding(mesh))
  np.testing.assert_array_equal(
    generate.generate(LLAMA, spread, tokens, 6),
    generate.generate(LLAMA, params_of('llama'), TOKENS, 6),
  )


# Relative distances from float32 in the norm of a whole array. A product of
# bfloat16 rounds to 2**-9; three blocks of some ten roundings in a row stay
# below 3 %, and soft-capped or normed sums do not add up worse.
BFLOAT16_BOUND = 0.03


@pytest.mark.parametrize('family', ['gemma', 'neox'])
def test_bfloat16_stays_close(family):
  config, params = CONFIGS[family], params_of(family)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  wide = run(config, params, TOKENS)
  for exact, rounded in zip(wide, run(config, narrow, TOKENS)):
    assert rounded.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(rounded, np.float32) - exact)
    assert error < BFLOAT16_BOUND * np.linalg.norm(exact)
  # Half the bits again are too few.
  crude = jax.tree.map(lambda x: x.astype('float8_e4m3fn'), narrow)
  crude = jax.tree.map(lambda x: x.astype(jnp.bfloat16), crude)
  error = np.linalg.norm(
    np.asarray(run(config, crude, TOKENS)[0], np.float32) - wide[0]
  )
  assert error > BFLOAT16_BOUND * np.linalg.norm(wide[0])


@pytest.mark.parametrize(
  'name', ['llama 3 stretched positions', 'gemma 2, caps and windows']
)
def test_a_saved_subject_comes_back(name, tmp_path):
  record = hf_folder.golden()[name]
  loaded = subject.load(hf_folder.write(tmp_path / 'hf', record))
  url = str(tmp_path / 'saved')
  subject.save(loaded, url)
  back = subject.load(url)
  assert back.name == url
  # Equal as a static argument too, whose tuples JSON does not know.
  assert hash(back.config) == hash(loaded.config)
  assert back.config == loaded.config
  assert back.weights_sha256 == loaded.weights_sha256
  assert back.tokenizer.to_str() == loaded.tokenizer.to_str()
  jax.tree.map(np.testing.assert_array_equal, back.params, loaded.params)
  mesh = mesh_lib.make_mesh(2, 2, jax.devices()[:4])
  spread = subject.load(url, mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, spread.params, loaded.params)
  assert len(spread.params['blocks']['up'].sharding.device_set) == 4
  direct = subject.load(tmp_path / 'hf', mesh=mesh)
  assert jax.tree.map(lambda x: x.sharding, direct.params) == (
    jax.tree.map(lambda x: x.sharding, spread.params)
  )
  jax.tree.map(np.testing.assert_array_equal, direct.params, loaded.params)
  narrow = subject.load(url, dtype='bfloat16')
  assert narrow.params['embed'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    narrow.params['embed'], loaded.params['embed'].astype(jnp.bfloat16)
  )
  _flip_a_bit(tmp_path / 'saved/params')
  with pytest.raises(errors.UserError, match=r'array .*params is damaged \('):
    subject.load(url)
  with pytest.raises(errors.UserError) as error:
    subject.save(loaded, url)
  assert str(error.value) == (
    f'{url} holds a subject already: use another folder or delete this one'
  )


def _flip_a_bit(folder):
  """In the middle of the largest file, which holds the largest arrays."""
  path = max(
    (path for path in folder.rglob('*') if path.is_file()),
    key=lambda path: path.stat().st_size,
  )
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_subject_saved_by_an_older_version_is_read(tmp_path):
  arrays = {'blocks': [{'up': jnp.arange(6.0)}], 'embed': jnp.ones((2, 3))}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'params', arrays)
  wanted = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
    arrays,
  )
  got = orbax_lib.load_tree(str(tmp_path / 'params'), wanted, '')
  jax.tree.map(np.testing.assert_array_equal, got, arrays)


def test_a_saved_subject_of_another_version_is_refused(tmp_path):
  assert not saved.is_saved(str(tmp_path))
  (tmp_path / 'subject.json').write_text('{"config": {"n_layers": 3}}')
  with pytest.raises(errors.UserError, match='of another version'):
    saved.load(str(tmp_path))
