"""Generation with cached keys and values, beside whole passes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.subject import capture, generate, splice, transformer
from tests.support.subject_models import (
  CONFIGS,
  GEMMA,
  GPT2,
  LLAMA,
  params_of,
  TOKENS,
)

LENGTHS = np.array([9, 5])
NEW = 6


@functools.partial(jax.jit, static_argnums=(0, 1))
def whole_pass(config, edits, params, tokens_BT):
  return splice.splice_many(config, params, tokens_BT, dict(edits))


def chosen_again(config, params, length, new_S, edits=None):
  """What whole passes over a prompt and its new tokens choose at each."""
  total = 9 + NEW
  whole_BT = np.zeros((len(length), total), np.int32)
  for row, n in enumerate(length):
    whole_BT[row, :n] = TOKENS[row, :n]
    whole_BT[row, n : n + NEW] = new_S[row]
  logits_BTV = np.asarray(
    whole_pass(config, tuple((edits or {}).items()), params, whole_BT)
  )
  return np.array(
    [
      logits_BTV[row, n - 1 : n - 1 + NEW].argmax(-1)
      for row, n in enumerate(length)
    ]
  )


# Llama is in the tests below, NeoX in none: its attention is as theirs.
@pytest.mark.parametrize('family', ['gemma', 'gpt2'])
def test_the_cache_gives_what_whole_passes_give(family):
  config, params = CONFIGS[family], params_of(family)
  new = generate.generate(config, params, TOKENS, NEW, length_B=LENGTHS)
  new = np.asarray(new)
  assert new.shape == (2, NEW) and len(np.unique(new)) > 4
  np.testing.assert_array_equal(new, chosen_again(config, params, LENGTHS, new))
  # What is beyond a prompt's end is not read.
  other = TOKENS.copy()
  other[1, 5:] = 7
  again = generate.generate(config, params, other, NEW, length_B=LENGTHS)
  np.testing.assert_array_equal(again, new)
  # With another length it would be.
  longer = generate.generate(config, params, TOKENS, NEW)
  assert (np.asarray(longer)[1] != new[1]).any()


def test_a_window_that_the_cache_forgets_is_seen():
  new = generate.generate(GEMMA, params_of('gemma'), TOKENS, NEW)
  config = dataclasses.replace(GEMMA, windows=())
  whole = chosen_again(config, params_of('gemma'), [9, 9], np.asarray(new))
  assert (whole != np.asarray(new)).any()


def test_steering_is_the_splice_at_every_step():
  params = params_of('llama')
  site = capture.Site(1, 'resid_post')
  vector_D = np.random.default_rng(1).normal(size=LLAMA.d_model)
  edit = generate.Edit(site, generate.add, vector_D.astype(np.float32))
  plain, steered, late = (
    np.asarray(
      generate.generate(
        LLAMA, params, TOKENS, NEW, length_B=LENGTHS, edits=edits
      )
    )
    for edits in ((), (edit,), (edit._replace(on_prompt=False),))
  )
  np.testing.assert_array_equal(
    steered,
    chosen_again(
      LLAMA,
      params,
      LENGTHS,
      steered,
      {site: lambda x: generate.add(vector_D, x)},
    ),
  )
  assert (steered != plain).any() and (late != steered).any()
  # Left as it was until the first new token was read.
  np.testing.assert_array_equal(late[:, 0], plain[:, 0])
  assert (late != plain).any()
  # Another vector compiles nothing.
  n_programs = generate._advance_many._cache_size()
  other = edit._replace(argument=2 * edit.argument)
  generate.generate(
    LLAMA, params, TOKENS, NEW, length_B=LENGTHS, edits=(other,)
  )
  assert generate._advance_many._cache_size() == n_programs


def test_a_stream_is_the_same_and_ends_at_the_stop():
  params = params_of('llama')
  new = np.asarray(generate.generate(LLAMA, params, TOKENS, NEW))
  # The third token of row 0, which row 1 may never draw.
  stop = int(new[0, 2])
  expected = new.copy()
  for row in expected:
    stops = np.flatnonzero(row == stop)
    row[stops[0] if len(stops) else NEW :] = stop
  sampling = generate.Sampling(stop_token=stop)
  stopped = generate.generate(LLAMA, params, TOKENS, NEW, sampling=sampling)
  np.testing.assert_array_equal(stopped, expected)
  streamed = list(
    generate.stream(LLAMA, params, TOKENS, NEW, sampling=sampling)
  )
  np.testing.assert_array_equal(
    np.stack(streamed, 1), expected[:, : len(streamed)]
  )
  done = (expected == stop).all(0)
  assert len(streamed) == (int(done.argmax()) + 1 if done.any() else NEW)
  # Alone, row 0 ends early.
  streamed = list(
    generate.stream(LLAMA, params, TOKENS[:1], NEW, sampling=sampling)
  )
  assert len(streamed) == np.flatnonzero(new[0] == stop)[0] + 1


def test_draws_follow_the_softmax():
  params = params_of('llama')
  prompts = np.repeat(TOKENS[:1], 4000, 0)[:, :3]
  temperature = 2.0

  def drawn(**sampling):
    sampling = generate.Sampling(temperature=temperature, **sampling)
    new = generate.generate(LLAMA, params, prompts, 1, sampling=sampling)
    return np.bincount(np.asarray(new)[:, 0], minlength=61) / len(prompts)

  logits_V = transformer.forward(LLAMA, params, prompts[:1])[0, -1]
  p_V = np.asarray(jax.nn.softmax(logits_V / temperature))
  # Four deviations of a share, at the largest.
  bound = 4 * np.sqrt(0.25 / len(prompts))
  assert np.abs(drawn() - p_V).max() < bound
  best = np.argsort(-p_V)[:3]
  some_V = drawn(top_k=3)
  assert set(np.flatnonzero(some_V)) == set(best)
  assert np.abs(some_V[best] - p_V[best] / p_V[best].sum()).max() < bound
  # The other temperature is another distribution.
  sharp_V = np.asarray(jax.nn.softmax(logits_V))
  assert np.abs(drawn() - sharp_V).max() > bound


@pytest.mark.parametrize(
  'options, message',
  [
    (
      {'n_new': 9},
      'prompts of up to 9 tokens and 9 more need 17 positions, this subject '
      'has 16: use fewer',
    ),
    ({'n_new': 0}, 'n_new 0 must be at least 1'),
    (
      {'n_new': 1, 'length_B': [9, 10]},
      'lengths from 9 to 10 must be between 1 and the 9 tokens of the prompts',
    ),
  ],
)
def test_what_cannot_be_generated_is_refused(options, message):
  with pytest.raises(errors.UserError) as error:
    generate.generate(GPT2, params_of('gpt2'), TOKENS, **options)
  assert str(error.value) == message
  beyond = TOKENS.copy()
  beyond[0, 3] = GPT2.vocab_size
  with pytest.raises(errors.UserError, match='is outside of the'):
    generate.generate(GPT2, params_of('gpt2'), beyond, 1)
  # What is beyond a prompt's end may be any number.
  generate._check_ids(GPT2, beyond, np.array([3, 9]))
  with pytest.raises(errors.UserError, match='must not be negative'):
    generate.Sampling(temperature=-1.0)
