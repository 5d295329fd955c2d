"""The transformer against a plain numpy forward in float64, and causality."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.subject import attention, transformer

CONFIG = transformer.TransformerConfig(
  n_layers=3,
  d_model=20,
  n_heads=6,
  n_kv_heads=2,
  d_head=8,
  d_ff=28,
  vocab_size=53,
  rope_base=100.0,
  norm_eps=1e-3,
  rope_pairs='interleaved',
)
HALF = dataclasses.replace(CONFIG, rope_pairs='half')
forward = jax.jit(transformer.forward, static_argnums=0)


@functools.cache
def random_params():
  """Random parameters whose norms are not all one."""
  params = transformer.init(CONFIG, jax.random.key(0))
  rng = np.random.default_rng(0)
  scale = functools.partial(rng.uniform, 0.5, 1.5)
  params['final_norm'] *= scale(size=params['final_norm'].shape)
  for name in ('attn_norm', 'ffn_norm'):
    params['blocks'][name] *= scale(size=params['blocks'][name].shape)
  return params


@functools.cache
def random_tokens(n_sequences=3, n_positions=9):
  rng = np.random.default_rng(1)
  return rng.integers(0, CONFIG.vocab_size, (n_sequences, n_positions))


def numpy_forward(config, params, tokens_BT, offset_TD=0.0, defect=None):
  """Logits in float64, a sequence, head and position at a time.

  Args:
    config: the transformer's shape.
    params: its parameters.
    tokens_BT: token ids.
    offset_TD: added to the embedded tokens, for numerical gradients.
    defect: a mistake to plant, for the negative control.
  """
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  blocks, width = params['blocks'], config.d_head

  def norm(x, scale):
    eps = 0.0 if defect == 'no epsilon' else config.norm_eps
    return x / np.sqrt((x**2).mean() + eps) * scale

  def rotate(x, position):
    out = np.empty_like(x)
    for i in range(width // 2):
      a, b = 2 * i, 2 * i + 1
      if config.rope_pairs == 'half':
        a, b = i, i + width // 2
      angle = position * config.rope_base ** (-2 * i / width)
      if defect == 'rotates backwards':
        angle = -angle * (1 + i)
      out[a] = x[a] * np.cos(angle) - x[b] * np.sin(angle)
      out[b] = x[a] * np.sin(angle) + x[b] * np.cos(angle)
    return out

  def head_of(x, head):
    return x[head * width : (head + 1) * width]

  def block(i, resid_TD):
    w = {name: value[i] for name, value in blocks.items()}
    normed = [norm(x, w['attn_norm']) for x in resid_TD]
    resid_TD = resid_TD.copy()
    mixed = [[] for _ in normed]
    for head in range(config.n_heads):
      group = head // (config.n_heads // config.n_kv_heads)
      if defect == 'heads dealt in turn':
        group = head % config.n_kv_heads
      keys = [
        rotate(head_of(x @ w['key'], group), t) for t, x in enumerate(normed)
      ]
      values = [head_of(x @ w['value'], group) for x in normed]
      for t, x in enumerate(normed):
        query = rotate(head_of(x @ w['query'], head), t)
        seen = len(normed) if defect == 'sees the future' else t + 1
        scores = np.array([query @ k for k in keys[:seen]]) / np.sqrt(width)
        weights = np.exp(scores) / np.exp(scores).sum()
        mixed[t].append(sum(a * v for a, v in zip(weights, values[:seen])))
    for t, heads in enumerate(mixed):
      resid_TD[t] += np.concatenate(heads) @ w['attn_out']
      x = norm(resid_TD[t], w['ffn_norm'])
      gate = x @ w['gate']
      resid_TD[t] += (gate / (1 + np.exp(-gate)) * (x @ w['up'])) @ w['down']
    return resid_TD

  logits = []
  for tokens_T in tokens_BT:
    resid_TD = params['embed'][tokens_T] + offset_TD
    for i in range(config.n_layers):
      resid_TD = block(i, resid_TD)
    normed = [norm(x, params['final_norm']) for x in resid_TD]
    logits.append(normed @ params.get('unembed', params['embed']).T)
  return np.array(logits)


@pytest.mark.parametrize('config', [CONFIG, HALF], ids=lambda c: c.rope_pairs)
def test_forward_equals_numpy_float64(config):
  logits = forward(config, random_params(), random_tokens())
  expected = numpy_forward(config, random_params(), random_tokens())
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  'defect',
  ['no epsilon', 'rotates backwards', 'heads dealt in turn', 'sees the future'],
)
def test_a_planted_defect_is_seen(defect):
  logits = forward(CONFIG, random_params(), random_tokens())
  wrong = numpy_forward(CONFIG, random_params(), random_tokens(), defect=defect)
  assert np.abs(logits - wrong).max() > 100 * 2e-5


def test_the_other_rotary_pairs_are_seen():
  logits = forward(HALF, random_params(), random_tokens())
  wrong = numpy_forward(CONFIG, random_params(), random_tokens())
  assert np.abs(logits - wrong).max() > 0.1


def test_half_pairs_are_interleaved_pairs_of_permuted_weights():
  params = random_params()
  n_layers, d_model, width = CONFIG.n_layers, CONFIG.d_model, CONFIG.d_head
  permuted = dict(params, blocks=dict(params['blocks']))
  for name in ('query', 'key'):
    weight = params['blocks'][name].reshape(
      n_layers, d_model, -1, 2, width // 2
    )
    permuted['blocks'][name] = weight.swapaxes(-1, -2).reshape(
      params['blocks'][name].shape
    )
  np.testing.assert_allclose(
    forward(HALF, params, random_tokens()),
    forward(CONFIG, permuted, random_tokens()),
    rtol=1e-5,
    atol=1e-5,
  )


def test_an_untied_embedding_is_used():
  params = dict(random_params())
  params['unembed'] = params['embed'][::-1]
  logits = forward(CONFIG, params, random_tokens())
  np.testing.assert_allclose(
    logits,
    forward(CONFIG, random_params(), random_tokens())[..., ::-1],
    rtol=1e-5,
    atol=1e-5,
  )


def test_gradient_equals_float64_differences():
  params, tokens = random_params(), random_tokens()[:1]
  rng = np.random.default_rng(2)
  shape = (*tokens.shape, CONFIG.d_model)
  direction_BTD = rng.normal(size=shape).astype(np.float32)
  weight_BTV = rng.normal(size=(*tokens.shape, CONFIG.vocab_size))

  def loss(resid_BTD):
    resid_BTD = transformer.run_blocks(
      CONFIG, params, resid_BTD, 0, CONFIG.n_layers
    )
    logits_BTV = transformer.unembed(CONFIG, params, resid_BTD)
    return jnp.sum(logits_BTV * weight_BTV)

  gradient_BTD = jax.jit(jax.grad(loss))(
    transformer.embed(CONFIG, params, tokens)
  )
  slope = np.sum(np.asarray(gradient_BTD, np.float64) * direction_BTD)
  step = 1e-5
  up, down = (
    numpy_forward(CONFIG, params, tokens, sign * step * direction_BTD[0])
    for sign in (1, -1)
  )
  expected = np.sum((up - down) * weight_BTV) / (2 * step)
  np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_a_token_changes_nothing_before_it():
  tokens = random_tokens().copy()
  before = np.asarray(forward(CONFIG, random_params(), tokens))
  tokens[:, 5] = (tokens[:, 5] + 1) % CONFIG.vocab_size
  after = np.asarray(forward(CONFIG, random_params(), tokens))
  np.testing.assert_array_equal(before[:, :5], after[:, :5])
  changed_BT = np.abs(before - after).max(-1) > 1e-4
  assert changed_BT[:, 5:].all()


def test_right_padding_changes_nothing_before_it():
  tokens = random_tokens()
  logits = np.asarray(forward(CONFIG, random_params(), tokens))
  padded = np.pad(tokens, ((0, 0), (0, 7)), constant_values=3)
  longer = np.asarray(forward(CONFIG, random_params(), padded))
  n = tokens.shape[1]
  np.testing.assert_allclose(longer[:, :n], logits, rtol=1e-5, atol=1e-5)
  # Left padding is the control: it must show.
  shifted = np.asarray(forward(CONFIG, random_params(), padded[:, ::-1]))
  assert np.abs(shifted[:, -n:][:, ::-1] - logits).max() > 0.1


def test_sequences_do_not_mix():
  tokens = random_tokens()
  alone = forward(CONFIG, random_params(), tokens[1:2])
  together = forward(CONFIG, random_params(), tokens)[1:2]
  np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)


def test_attention_one_group_at_a_time_equals_the_batched_product():
  rng = np.random.default_rng(3)
  query_BGQTE = rng.normal(size=(2, 3, 4, 7, 8)).astype(np.float32)
  key_BGTE, value_BGTE = rng.normal(size=(2, 2, 3, 7, 8)).astype(np.float32)
  seen_TU = np.tri(7, dtype=bool)
  np.testing.assert_allclose(
    attention.attend(query_BGQTE, key_BGTE, value_BGTE, seen_TU, 0.3),
    # A mask for each sequence takes the batched product.
    attention.attend(
      query_BGQTE, key_BGTE, value_BGTE, np.stack([seen_TU] * 2), 0.3
    ),
    rtol=1e-5,
    atol=1e-6,
  )


def test_an_accelerator_gets_the_batched_product():
  traced = forward.trace(CONFIG, random_params(), random_tokens())
  loops = {
    platform: traced.lower(lowering_platforms=(platform,))
    .as_text()
    .count('stablehlo.while')
    for platform in ('cpu', 'tpu')
  }
  # The scan over blocks, and on a CPU the map over heads inside it.
  assert loops == {'cpu': 2, 'tpu': 1}


def test_bfloat16_parameters_stay_close():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params())
  logits = forward(CONFIG, params, random_tokens())
  expected = numpy_forward(CONFIG, random_params(), random_tokens())
  assert logits.dtype == jnp.bfloat16
  error = np.linalg.norm(np.asarray(logits, np.float64) - expected)
  assert error < 0.05 * np.linalg.norm(expected)


def test_init_has_the_shapes_and_scales_it_says():
  config = dataclasses.replace(CONFIG, d_model=256, d_ff=512, vocab_size=1024)
  params = transformer.init(config, jax.random.key(4))
  shapes = transformer.param_shapes(config)
  assert jax.tree.map(jnp.shape, params) == shapes
  assert (params['final_norm'] == 1).all()
  np.testing.assert_allclose(params['embed'].std(), 1, rtol=0.02)
  down = params['blocks']['down']
  np.testing.assert_allclose(down.std(), 512**-0.5, rtol=0.02)
  assert not np.allclose(params['blocks']['gate'], params['blocks']['up'])


@pytest.mark.parametrize(
  'change, message',
  [
    ({'n_heads': 7}, 'n_heads 7 must be a multiple of n_kv_heads 2'),
    ({'d_head': 5}, 'd_head 5 must be even: rotary positions turn pairs'),
    (
      {'rope_pairs': 'thirds'},
      "rope_pairs 'thirds' is not known: use one of interleaved, half",
    ),
  ],
)
def test_a_shape_that_does_not_fit_is_refused(change, message):
  with pytest.raises(errors.UserError) as error:
    dataclasses.replace(CONFIG, **change)
  assert str(error.value) == message
