"""Generating tokens with cached keys and values, with or without steering."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import errors
from sae_jax.subject import capture, transformer


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn; static under jit.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: how many of the most likely tokens to draw from; 0 for all.
    stop_token: once drawn, a sequence repeats it; -1 for none.
  """

  temperature: float = 0.0
  top_k: int = 0
  stop_token: int = -1

  def __post_init__(self):
    if self.temperature < 0 or self.top_k < 0:
      raise errors.UserError(
        f'temperature {self.temperature} and top_k {self.top_k} must not be '
        'negative'
      )


class Edit(NamedTuple):
  """A change of the activations at a site.

  Attributes:
    site: where.
    apply: (argument, activations) -> activations; a function at the top level
      of a module, since each function is compiled.
    argument: arrays for `apply`, which may change without compiling again.
    on_prompt: whether the prompt's tokens are changed too, or only those after
      it.
  """

  site: capture.Site
  apply: Callable[[Any, jax.Array], jax.Array]
  argument: Any = None
  on_prompt: bool = True


def add(vector_D: jax.Array, x_BTD: jax.Array) -> jax.Array:
  """Steers: adds the vector to every token's activations."""
  return x_BTD + vector_D[None, None].astype(x_BTD.dtype)


class _State(NamedTuple):
  """The state of generation between two tokens.

  Attributes:
    tokens_B: the last tokens drawn, which the subject has not read yet.
    position_B: their positions.
    stopped_B: whether each sequence has drawn the stop token.
    cache: keys and values of the tokens that were read.
    key: for the next draw.
  """

  tokens_B: jax.Array
  position_B: jax.Array
  stopped_B: jax.Array
  cache: transformer.Cache
  key: jax.Array


def _edits(rules, arguments, prompt: bool) -> capture.Edits:
  return {
    site: functools.partial(apply, argument)
    for (site, apply, on_prompt), argument in zip(rules, arguments)
    if on_prompt or not prompt
  }


def _draw(sampling: Sampling, logits_BV: jax.Array, key: jax.Array):
  logits_BV = logits_BV.astype(jnp.float32)
  if not sampling.temperature:
    return logits_BV.argmax(-1).astype(jnp.int32)
  logits_BV /= sampling.temperature
  if 0 < sampling.top_k < logits_BV.shape[-1]:
    best_BK, id_BK = jax.lax.top_k(logits_BV, sampling.top_k)
    drawn_B = jax.random.categorical(key, best_BK)
    drawn_B = jnp.take_along_axis(id_BK, drawn_B[:, None], 1)[:, 0]
  else:
    drawn_B = jax.random.categorical(key, logits_BV)
  return drawn_B.astype(jnp.int32)


_STATIC = ('config', 'sampling', 'rules', 'n_positions')


@functools.partial(jax.jit, static_argnames=_STATIC)
def _start(
  config, sampling, rules, n_positions, params, arguments, tokens_BT, length_B,
  key,
) -> _State:  # fmt: skip
  """Reads the prompts and draws the token after each."""
  n_sequences = tokens_BT.shape[0]
  cache = transformer.make_cache(config, params, n_sequences, n_positions)
  # The padding of a prompt is cached too, but each position is overwritten
  # before a token attends to it.
  out = capture.run(
    config,
    params,
    tokens_BT,
    edits=_edits(rules, arguments, prompt=True),
    logits=True,
    logits_at_B=length_B - 1,
    cache=cache,
    first_B=jnp.zeros(n_sequences, jnp.int32),
  )
  key, own = jax.random.split(key)
  tokens_B = _draw(sampling, out.logits_BTV[:, 0], own)
  stopped_B = tokens_B == sampling.stop_token
  return _State(tokens_B, length_B, stopped_B, out.cache, key)


def _advance(config, sampling, rules, params, arguments, state) -> _State:
  """Reads the last token and draws the next."""
  out = capture.run(
    config,
    params,
    state.tokens_B[:, None],
    edits=_edits(rules, arguments, prompt=False),
    logits=True,
    cache=state.cache,
    first_B=state.position_B,
  )
  key, own = jax.random.split(state.key)
  tokens_B = _draw(sampling, out.logits_BTV[:, 0], own)
  tokens_B = jnp.where(state.stopped_B, state.tokens_B, tokens_B)
  return _State(
    tokens_B,
    state.position_B + 1,
    state.stopped_B | (tokens_B == sampling.stop_token),
    out.cache,
    key,
  )


_advance_alone = jax.jit(
  _advance,
  static_argnames=('config', 'sampling', 'rules'),
  donate_argnames='state',
)


@functools.partial(
  jax.jit, static_argnames=('config', 'sampling', 'rules', 'n')
)
def _advance_many(config, sampling, rules, n, params, arguments, state):
  def step(state, _):
    state = _advance(config, sampling, rules, params, arguments, state)
    return state, state.tokens_B

  return jax.lax.scan(step, state, length=n)[1]


def _check_ids(config, tokens_BT, lengths):
  """Raises UserError for an id without a row, which JAX would read as one."""
  inside_BT = np.arange(tokens_BT.shape[1]) < lengths[:, None]
  ids_BT = jnp.where(inside_BT, tokens_BT, 0)
  for token in (int(ids_BT.min()), int(ids_BT.max())):
    if not 0 <= token < config.vocab_size:
      raise errors.UserError(
        f'token id {token} is outside of the {config.vocab_size} rows of the '
        "embedding: tokenize the prompts with the subject's own tokenizer"
      )


def _prepare(config, params, tokens_BT, length_B, n_new, sampling, edits, seed):
  tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
  n_sequences, n_prompt = tokens_BT.shape
  if length_B is None:
    length_B = np.full(n_sequences, n_prompt)
  lengths = np.asarray(length_B)
  if lengths.min() < 1 or lengths.max() > n_prompt:
    raise errors.UserError(
      f'lengths from {lengths.min()} to {lengths.max()} must be between 1 and '
      f'the {n_prompt} tokens of the prompts'
    )
  _check_ids(config, tokens_BT, lengths)
  if n_new < 1:
    raise errors.UserError(f'n_new {n_new} must be at least 1')
  # The last token drawn is never read.
  longest = max(n_prompt, int(lengths.max()) + n_new - 1)
  if config.n_positions and longest > config.n_positions:
    raise errors.UserError(
      f'prompts of up to {n_prompt} tokens and {n_new} more need {longest} '
      f'positions, this subject has {config.n_positions}: use fewer'
    )
  for edit in edits:
    capture.check_site(config, edit.site)
  rules = tuple((e.site, e.apply, e.on_prompt) for e in edits)
  arguments = tuple(e.argument for e in edits)
  state = _start(
    config,
    sampling,
    rules,
    n_prompt + n_new,
    params,
    arguments,
    tokens_BT,
    jnp.asarray(lengths, jnp.int32),
    jax.random.key(seed),
  )
  return rules, arguments, state


def generate(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  tokens_BT: jax.Array,
  n_new: int,
  *,
  length_B: np.ndarray | None = None,
  sampling: Sampling = Sampling(),
  edits: tuple[Edit, ...] = (),
  seed: int = 0,
) -> jax.Array:
  """Continues prompts, as drawing from `forward` token by token would.

  Compiles once for each shape, sampling and set of edited sites.

  Args:
    config: the subject's shape.
    params: its parameters.
    tokens_BT: prompts, padded on the right with any id.
    n_new: tokens to draw for each.
    length_B: tokens of each prompt; None for all of them.
    sampling: how a token is drawn.
    edits: changes of activations, at most one for each site.
    seed: seed of the draws.

  Returns:
    The new tokens, int32 [B, n_new].

  Raises:
    UserError: if there are too few positions, no such site, or a token is not
      in the embedding.
  """
  rules, arguments, state = _prepare(
    config, params, tokens_BT, length_B, n_new, sampling, edits, seed
  )
  first_B1 = state.tokens_B[:, None]
  if n_new == 1:
    return first_B1
  rest_SB = _advance_many(
    config, sampling, rules, n_new - 1, params, arguments, state
  )
  return jnp.concatenate([first_B1, rest_SB.T], axis=1)


def stream(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  tokens_BT: jax.Array,
  n_new: int,
  *,
  length_B: np.ndarray | None = None,
  sampling: Sampling = Sampling(),
  edits: tuple[Edit, ...] = (),
  seed: int = 0,
) -> Iterator[np.ndarray]:
  """The tokens of `generate`, yielded as tokens_B when they are drawn.

  Takes the same arguments. Ends early when every sequence has stopped.
  """
  rules, arguments, state = _prepare(
    config, params, tokens_BT, length_B, n_new, sampling, edits, seed
  )
  for i in range(n_new):
    if i:
      state = _advance_alone(config, sampling, rules, params, arguments, state)
    tokens_B, stopped = np.asarray(state.tokens_B), np.all(state.stopped_B)
    yield tokens_B
    if stopped:
      return
