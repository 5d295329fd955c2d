"""Latents that are drawn and explained by token patterns, for several uses."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import progress
from sae_jax.probing.suite import ablating, arrays
from sae_jax.probing.suite import patterns as patterns_lib
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import CannotMeasure, Context, Texts
from sae_jax.subject import capture
from sae_jax.subject.formats import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    latents: of each draw, of each autoencoder.
    tokens: of training text that examples are of, and of test text.
    examples: of each latent.
  """

  latents: int
  tokens: int
  examples: int
  batch_contexts: int = 8


SIZES = {'quick': Size(3, 16_384, 8), 'all': Size(40, 200_000, 16)}
# A latent that fires on fewer tokens of the training text is not explained.
_LEAST_FIRINGS = 5
_LONGEST = patterns_lib.TRIED[-1]
# Texts that the subject reads at a time, and their tokens: ends of an example,
# or it with a token replaced and with one before. The least that holds them.
_TEXTS = tuple(n + 1 for n in patterns_lib.TRIED)
# Tokens that end texts, by the names that families give them.
_PADS = ('<|endoftext|>', '</s>', '<eos>', '<|end_of_text|>', '<pad>')


class Explained(NamedTuple):
  """Latents of an autoencoder, their patterns, and what they do on test text.

  Attributes:
    latents: U of them.
    draw_U: the draw of each.
    patterns: of each.
    texts: the test text, C contexts.
    firing: of each, the flat places in [C, T] of the kept tokens on which it
      fires, and its activations there.
  """

  latents: np.ndarray
  draw_U: np.ndarray
  patterns: list[list[patterns_lib.Pattern]]
  texts: Texts
  firing: list[tuple[np.ndarray, np.ndarray]]

  def activations(self, place: int) -> np.ndarray:
    """The activations [C, T] of one of the latents."""
    out_CT = np.zeros(self.texts.tokens_CT.shape, np.float32)
    where, values = self.firing[place]
    out_CT.reshape(-1)[where] = values
    return out_CT

  def predictions(self, patterns: list[patterns_lib.Pattern]) -> np.ndarray:
    """What patterns predict on the kept tokens, [C, T]; see `patterns`."""
    texts = self.texts
    guess_CT = patterns_lib.predictions(
      patterns, texts.tokens_CT, texts.length_C
    )
    return np.where(texts.kept_CT, guess_CT, 0)


def of(context: Context, size: Size) -> dict[str, Explained]:
  """The explained latents of each autoencoder, made once for a context.

  Raises:
    CannotMeasure: if too few latents fire.
  """
  key = 'explained', size.latents, size.tokens, size.examples
  if key not in context.made:
    context.made[key] = _explained(context, size)
  return context.made[key]


def _explained(context: Context, size: Size) -> dict[str, Explained]:
  texts = {
    kind: context.texts(-(-size.tokens // context.draws), 'n2g', kind)
    for kind in ('training', 'test')
  }
  out = {}
  for name, scored in context.scored.items():
    latents = _Latents(context, scored, size)
    chosen, draw_U = latents.choose(context.rng('n2g', name), texts['training'])
    with progress.bar(
      total=len(chosen), unit='latent', desc=f'N2G: {name}'
    ) as bar:
      patterns = []
      for examples in chosen.values():
        patterns.append(latents.explain(*examples))
        bar.update(1)
    firing = latents.firing(texts['test'], list(chosen))
    latents_U = np.array(list(chosen))
    out[name] = Explained(latents_U, draw_U, patterns, texts['test'], firing)
  return out


class _Latents:
  """The latents of an autoencoder on texts."""

  def __init__(self, context: Context, scored: scored_lib.Scored, size: Size):
    self._context, self._scored, self._size = context, scored, size
    tokenizer, bos = context.subject.tokenizer, context.store.manifest.bos
    start = tokenizer_lib.context_start(tokenizer, bos)
    self._start = [] if start is None else [start]
    self._pad = _pad_token(tokenizer)

  def codes(self, texts) -> tuple[np.ndarray, np.ndarray]:
    """Values and latents of all kept tokens of texts, [C, T, K]; else 0."""
    size, mesh = self._size, self._context.mesh
    vals, idx = [], []
    for start, stop in arrays.batches(
      size.batch_contexts, len(texts.length_C), mesh
    ):
      tokens = arrays.on_data(
        texts.tokens_CT[start:stop], size.batch_contexts, mesh
      )
      out = _codes(
        self._context.subject.config,
        self._context.site,
        self._scored.shape,
        self._context.params,
        self._scored.sae,
        tokens,
      )
      own_vals, own_idx = (arrays.to_host(of, stop - start) for of in out)
      vals.append(np.where(texts.kept_CT[start:stop, :, None], own_vals, 0))
      idx.append(own_idx)
    return np.concatenate(vals), np.concatenate(idx)

  def choose(self, rng, texts):
    """Latents to explain -> contexts and activations of their examples.

    Args:
      rng: chooses among those that fire often enough.
      texts: the training text.

    Returns:
      By latent, the tokens up to each example and the activation there; and
      the draw that each latent is of.
    """
    vals_CTK, idx_CTK = self.codes(texts)
    fires = vals_CTK > 0
    counts = np.bincount(
      idx_CTK[fires], minlength=self._scored.shape.config.n_latents
    )
    able = np.flatnonzero(counts >= _LEAST_FIRINGS)
    draws = self._context.draws
    if len(able) < draws:
      raise CannotMeasure(
        f'{len(able)} latents fire on {_LEAST_FIRINGS} tokens or more of '
        f'{int(texts.length_C.sum())} of training text, {draws} are the fewest '
        'that are explained: harvest more text'
      )
    order = rng.permutation(able)
    dealt = [order[draw::draws][: self._size.latents] for draw in range(draws)]
    chosen = {}
    for latent in np.concatenate(dealt).tolist():
      value_CT = np.where(fires & (idx_CTK == latent), vals_CTK, 0).max(-1)
      chosen[latent] = (latent, *self._examples(rng, texts, value_CT))
    return chosen, np.repeat(np.arange(draws), list(map(len, dealt)))

  def _examples(self, rng, texts, value_CT):
    """Positive activations that are drawn at random, as Gao et al. draw them.

    The highest alone would say nothing of most tokens on which it fires.
    """
    places = rng.permutation(np.flatnonzero(value_CT))[: self._size.examples]
    contexts, at = np.unravel_index(places, value_CT.shape)
    first = len(self._start)
    tokens = [
      texts.tokens_CT[context, first : position + 1].tolist()
      for context, position in zip(contexts, at)
    ]
    return tokens, value_CT[contexts, at]

  def explain(self, latent, tokens, values) -> list[patterns_lib.Pattern]:
    """The patterns of a latent, of its examples."""
    return [
      patterns_lib.trimmed(
        patterns_lib.of_example(
          own,
          value,
          lambda texts: self._last(latent, texts),
          self._pad,
          _LONGEST,
        )
      )
      for own, value in zip(tokens, values)
      if own
    ]

  def _last(self, latent: int, texts: list[list[int]]) -> np.ndarray:
    """The latent's activation on the last token of each text."""
    most = max(len(texts), *map(len, texts))
    n_texts = next(n for n in _TEXTS if n >= most)
    tokens = np.zeros((n_texts, len(self._start) + n_texts), np.int32)
    last = np.zeros(n_texts, np.int32)
    for row, text in enumerate(texts):
      whole = self._start + text
      tokens[row, : len(whole)] = whole
      last[row] = len(whole) - 1
    mesh = self._context.mesh
    out = _last_values(
      self._context.subject.config,
      self._context.site,
      self._scored.shape,
      self._context.params,
      self._scored.sae,
      arrays.on_data(tokens, n_texts, mesh),
      arrays.on_data(last, n_texts, mesh),
      latent,
    )
    return arrays.to_host(out, len(texts))

  def firing(self, texts, latents) -> list[tuple[np.ndarray, np.ndarray]]:
    """See `Explained`."""
    vals_CTK, idx_CTK = self.codes(texts)
    out = []
    for latent in latents:
      value_T = np.where(idx_CTK == latent, vals_CTK, 0).max(-1).reshape(-1)
      where = np.flatnonzero(value_T > 0)
      out.append((where, value_T[where]))
    return out


def _pad_token(tokenizer) -> int:
  """A token that says nothing: one that ends texts, or else the first."""
  for name in _PADS:
    token = tokenizer.token_to_id(name)
    if token is not None:
      return token
  return 0


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _codes(config, site, shape, params, sae, tokens_BT):
  raw_BTD = capture.capture(config, params, tokens_BT, site)
  flat_BD = raw_BTD.reshape(-1, raw_BTD.shape[-1])
  codes = scored_lib.codes(shape, sae, flat_BD)
  codes = [of.reshape(*tokens_BT.shape, -1) for of in codes]
  return arrays.whole(codes, shape.mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _last_values(config, site, shape, params, sae, tokens_BT, last_B, latent):
  raw_BTD = capture.capture(config, params, tokens_BT, site)
  last_BD = ablating.at_token(raw_BTD, last_B)
  vals_BK, idx_BK = scored_lib.codes(shape, sae, last_BD)
  value_B = jnp.where(idx_BK == latent, vals_BK, 0).max(-1)
  return arrays.whole(value_B, shape.mesh)
