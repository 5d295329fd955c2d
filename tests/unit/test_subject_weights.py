"""GGUF files written here: what is read from them, and what is refused."""

import dataclasses
import hashlib

from etils.epath import testing as epath_testing
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import errors, subject
from sae_jax.subject import transformer
from sae_jax.subject.formats import gguf as gguf_lib
from sae_jax.subject.formats import tokenizer as tokenizer_lib

CONFIG = transformer.TransformerConfig(
  n_layers=2,
  context_length=64,
  d_model=64,
  n_heads=4,
  n_kv_heads=2,
  d_head=16,
  d_ff=96,
  vocab_size=6,
  rope_base=500.0,
  norm_eps=1e-4,
  rope_pairs='interleaved',
)
LETTERS = ['a', 'b', 'ab', 'Ġ', '<|end|>', 'c']
forward = jax.jit(transformer.forward, static_argnums=0)


def random_tensors():
  """Tensors under their GGUF names, each [outputs, inputs]."""
  rng = np.random.default_rng(0)
  shapes = {'token_embd': (6, 64), 'output_norm': (64,)}
  for i in range(CONFIG.n_layers):
    shapes |= {
      f'blk.{i}.attn_norm': (64,),
      f'blk.{i}.attn_q': (64, 64),
      f'blk.{i}.attn_k': (32, 64),
      f'blk.{i}.attn_v': (32, 64),
      f'blk.{i}.attn_output': (64, 64),
      f'blk.{i}.ffn_norm': (64,),
      f'blk.{i}.ffn_gate': (96, 64),
      f'blk.{i}.ffn_up': (96, 64),
      f'blk.{i}.ffn_down': (64, 96),
    }
  return {
    f'{name}.weight': rng.normal(size=shape).astype(np.float32) / 4
    for name, shape in shapes.items()
  }


def write_gguf(
  path,
  tensors,
  *,
  quantization=gguf.GGMLQuantizationType.F32,
  architecture='llama',
  settings=None,
  endianess=gguf.GGUFEndian.LITTLE,
):
  """Writes a small model; `settings` adds metadata, None drops a key."""
  values = {
    'block_count': 2,
    'context_length': 64,
    'embedding_length': 64,
    'feed_forward_length': 96,
    'attention.head_count': 4,
    'attention.head_count_kv': 2,
    'rope.dimension_count': 16,
    'rope.freq_base': 500.0,
    'attention.layer_norm_rms_epsilon': 1e-4,
  } | (settings or {})
  writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
  kinds = {int: 'uint32', float: 'float32', str: 'string'}
  for key, value in values.items():
    if value is not None:
      add = getattr(writer, f'add_{kinds[type(value)]}')
      add(f'{architecture}.{key}', value)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(LETTERS)
  writer.add_token_types([1, 1, 1, 1, 3, 1])
  writer.add_token_merges(['a b'])
  for name, values in tensors.items():
    if values.ndim == 1 or values.dtype != np.float32:
      writer.add_tensor(name, values)
    else:
      writer.add_tensor(
        name,
        gguf.quants.quantize(values, quantization),
        raw_dtype=quantization,
      )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


def test_f32_tensors_land_where_they_belong(tmp_path):
  tensors = random_tensors()
  path = write_gguf(tmp_path / 'm.gguf', tensors)
  loaded = subject.load(path)
  assert loaded.name == path
  assert dataclasses.replace(loaded.config, norm_eps=1e-4) == CONFIG
  assert loaded.config.norm_eps == np.float32(1e-4)
  with open(path, 'rb') as file:
    assert loaded.weights_sha256 == hashlib.sha256(file.read()).hexdigest()
  assert tokenizer_lib.encode(loaded.tokenizer, 'cab a') == [5, 2, 3, 0]

  shapes = jax.tree.map(jnp.shape, loaded.params)
  assert shapes == transformer.param_shapes(CONFIG)
  assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {
    jnp.dtype('float32')
  }
  np.testing.assert_array_equal(
    loaded.params['embed'], tensors['token_embd.weight']
  )
  names = {
    'query': 'attn_q',
    'key': 'attn_k',
    'value': 'attn_v',
    'attn_out': 'attn_output',
    'gate': 'ffn_gate',
    'up': 'ffn_up',
    'down': 'ffn_down',
    'attn_norm': 'attn_norm',
    'ffn_norm': 'ffn_norm',
  }
  for i in range(CONFIG.n_layers):
    for name, tensor in names.items():
      np.testing.assert_array_equal(
        loaded.params['blocks'][name][i], tensors[f'blk.{i}.{tensor}.weight'].T
      )


@pytest.mark.parametrize(
  'quantization, levels',
  [
    (gguf.GGMLQuantizationType.Q8_0, 254),
    (gguf.GGMLQuantizationType.Q4_1, 15),
  ],
  ids=lambda x: getattr(x, 'name', x),
)
def test_quantised_tensors_come_back_within_half_a_step(
  tmp_path, quantization, levels
):
  tensors = random_tensors()
  path = write_gguf(tmp_path / 'm.gguf', tensors, quantization=quantization)
  _, params = gguf_lib.load_params(gguf_lib.open_gguf(path))
  for i in range(CONFIG.n_layers):
    original = tensors[f'blk.{i}.ffn_down.weight'].reshape(-1, 32)
    loaded = np.asarray(params['blocks']['down'][i].T).reshape(-1, 32)
    span = 2 * np.abs(original).max(1) if levels == 254 else np.ptp(original, 1)
    # Half a step, and the scale's own rounding to float16.
    bound = span[:, None] / levels * 0.5 + np.abs(original) * 2e-3
    error = np.abs(loaded - original)
    assert (error <= bound + 1e-3 * span[:, None]).all()
    assert error.max() > 0.2 * (span / levels).max()


def test_an_untied_output_is_read(tmp_path):
  tensors = random_tensors()
  tensors['output.weight'] = tensors['token_embd.weight'][::-1].copy()
  tokens = np.array([[0, 1, 5]])
  tied, untied = (
    gguf_lib.load_params(
      gguf_lib.open_gguf(write_gguf(tmp_path / f'{len(x)}.gguf', x))
    )
    for x in (random_tensors(), tensors)
  )
  np.testing.assert_allclose(
    forward(*untied, tokens), forward(*tied, tokens)[..., ::-1], atol=1e-5
  )


def test_a_remote_file_is_the_local_one(tmp_path):
  path = write_gguf(tmp_path / 'm.gguf', random_tensors())

  def moved(original, url, *args, **kwargs):
    return original(str(url).replace('gs://bucket', str(tmp_path)), *args)

  with epath_testing.mock_epath(open=moved, exists=moved, isdir=moved):
    remote = subject.load('gs://bucket/m.gguf')
    with pytest.raises(errors.UserError, match='no file at gs://bucket/x'):
      subject.load('gs://bucket/x.gguf')
  local = subject.load(path)
  assert remote.weights_sha256 == local.weights_sha256
  jax.tree.map(np.testing.assert_array_equal, remote.params, local.params)


def without(name):
  return {k: v for k, v in random_tensors().items() if k != name}


@pytest.mark.parametrize(
  'tensors, options, message',
  [
    (
      without('blk.1.ffn_up.weight'),
      {},
      '{path} has no tensor blk.1.ffn_up.weight among its 19: '
      'download or convert the model again',
    ),
    (
      without('token_embd.weight'),
      {},
      '{path} has no tensor token_embd.weight among its 19: '
      'download or convert the model again',
    ),
    (
      random_tensors() | {'blk.0.attn_q.bias': np.zeros(64, np.float32)},
      {},
      '{path} has 1 tensors that the family does not use, '
      'as blk.0.attn_q.bias: its model is of another kind, use a plain one',
    ),
    (
      random_tensors() | {'blk.0.attn_k.weight': np.ones((64, 64), 'f')},
      {},
      'tensor blk.0.attn_k.weight of {path} has shape (64, 64), which does not '
      'give the (64, 32) that the config asks for: convert the model again',
    ),
    (
      random_tensors() | {'blk.0.attn_k.weight': np.ones((32, 64), np.int32)},
      {},
      'tensor blk.0.attn_k.weight of {path} is stored as I32, which gguf '
      'cannot dequantise: use a file of another quantisation',
    ),
    (
      random_tensors(),
      {'architecture': 'mamba'},
      "architecture 'mamba' of {path} is not supported: use a GGUF file of "
      'one of llama, gpt2, gptneox, qwen2, qwen3, gemma, gemma2, gemma3',
    ),
    (
      random_tensors(),
      {'settings': {'block_count': None}},
      '{path}: llama does not say block_count: convert the model again',
    ),
    (
      random_tensors(),
      {'settings': {'rope.scaling.type': 'yarn'}},
      "{path}: llama: rotary scaling 'yarn' is not supported: "
      'use a model whose positions are not scaled, or linearly',
    ),
    (
      random_tensors(),
      {'endianess': gguf.GGUFEndian.BIG},
      '{path} has the byte order of another machine: '
      'convert it with gguf-convert-endian',
    ),
  ],
)
def test_a_file_that_cannot_run_is_refused(tmp_path, tensors, options, message):
  path = write_gguf(tmp_path / 'm.gguf', tensors, **options)
  with pytest.raises(errors.UserError) as error:
    subject.load(path)
  assert str(error.value) == message.format(path=path)


def test_a_corrupt_file_is_refused(tmp_path):
  path = tmp_path / 'm.gguf'
  write_gguf(path, random_tensors())
  whole = path.read_bytes()
  gguf_lib.open_gguf(path)
  for content in (
    b'',
    b'not a model',
    b'<!DOCTYPE html>' * 1000,
    whole[:100],
    whole[:1500],
    whole[: len(whole) // 2],
    whole[:-64],
  ):
    path.write_bytes(content)
    with pytest.raises(errors.UserError) as error:
      subject.load(path)
    message = str(error.value)
    assert message.startswith(
      f'{path} is not a whole GGUF file ({len(content)} bytes, '
    )
    assert message.endswith('): download it again')
    assert '\n' not in message
