"""What each latent does to the predictions, on its own highest activations."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import progress
from sae_jax.ops.top_k import ordered
from sae_jax.probing import lens
from sae_jax.probing.suite import ablating, arrays
from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.figures import ratio, Sample, SHARE, Statistic
from sae_jax.probing.suite.outcome import Outcome
from sae_jax.subject import logit_lens

TITLE = 'Effects of single latents'
ABOUT = """Each latent is taken out of the tokens on which it is most active,
one at a time, and all else is left as it was. Recorded are how much higher the
loss of the next predictions is without it, how far their distributions move
(KL), and which tokens the latent makes likelier and less likely there: those
whose probability changes most, as by their logits rare tokens would lead. They
are columns of the feature table and stand beside the latent's examples.

The logit lens says which tokens a latent votes for by its direction alone. Its
agreement with the tokens that the ablation finds says how much of the latent's
effect is direct; the control is the agreement with another latent's votes. Gao
et al. (2024), section 4.4 and the feature browser."""
UNIT = 'latents'
ONE_SITE = True
OTHER = 'votes of another latent'
TOKENS = 16
VOTES = 10


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    latents: of each draw.
    examples: of each latent.
  """

  latents: int
  examples: int
  batch_latents: int = 2


SIZES = {'quick': Size(8, 2), 'all': Size(2000, 4)}

STATISTICS = {
  'kl': Statistic(
    'KL of an ablation',
    'Mean KL divergence of the predictions without the latent from those with '
    f'it, over {TOKENS} predictions from its token on; mean over latents.',
    ratio('kl', 'latents'),
    'nats',
  ),
  'delta_ce': Statistic(
    'delta CE of an ablation',
    'How much higher the cross-entropy of those next tokens is without it; '
    'mean over latents.',
    ratio('delta_ce', 'latents'),
    'nats',
  ),
  'agreement': Statistic(
    'direct votes',
    f'Share of the {VOTES} tokens that the latent votes for by the logit lens '
    f'that are among the {VOTES} whose logits fall most without it.',
    ratio('agreement', 'latents'),
    ends=SHARE,
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  latents, draws = context.latents(size.latents)
  rows_UM = context.top_rows(latents)[:, : size.examples]
  if not rows_UM.shape[1]:
    raise CannotMeasure('the scan kept no top examples: give --top_examples=16')
  parts = []
  with progress.bar(total=len(latents), unit='latent', desc='effects') as bar:
    for start in range(0, len(latents), size.batch_latents):
      take = slice(start, start + size.batch_latents)
      parts.append(
        _effects(context, latents[take], rows_UM[take], size.batch_latents)
      )
      bar.update(len(latents[take]))
  effects = Effects(*map(np.concatenate, zip(*parts)))
  sums = {
    'kl': effects.kl_U,
    'delta_ce': effects.delta_ce_U,
    'latents': np.ones(len(latents)),
  }
  samples = {}
  agreement_U = _agreement(context, latents, effects.raised_UV)
  if agreement_U is not None:
    own_U, other_U = agreement_U
    samples[OTHER] = Sample(
      latents, draws, {'agreement': other_U, 'latents': np.ones(len(latents))}
      | {term: np.full(len(latents), np.nan) for term in ('kl', 'delta_ce')},
    )  # fmt: skip
  else:
    own_U = np.full(len(latents), np.nan)
  itself = Sample(latents, draws, sums | {'agreement': own_U})
  return Outcome(
    {context.name: itself} | samples,
    columns=_columns(context, latents, effects),
  )


class Effects(NamedTuple):
  """Effects of U latents, means over their examples.

  Attributes:
    kl_U: in nats for a prediction.
    delta_ce_U: in nats for a token.
    raised_UV: tokens whose logits fall most without the latent, int32.
    up_UV: tokens whose probability falls most without it.
    up_changes_UV: by how much.
    down_UV: tokens whose probability rises most without it.
    down_changes_UV: by how much it falls, below 0.
  """

  kl_U: np.ndarray
  delta_ce_U: np.ndarray
  raised_UV: np.ndarray
  up_UV: np.ndarray
  up_changes_UV: np.ndarray
  down_UV: np.ndarray
  down_changes_UV: np.ndarray


def _effects(context, latents, rows_UM, batch) -> Effects:
  """Effects of at most `batch` latents."""
  count, n_examples = rows_UM.shape
  short = batch - count
  rows_UM = np.pad(rows_UM, ((0, short), (0, 0)), mode='edge')
  latents = np.pad(latents, (0, short), mode='edge')
  texts = [_text(context, int(row)) for row in rows_UM.reshape(-1)]
  tokens, at, length = map(np.array, zip(*texts))
  mesh, total = context.mesh, len(texts)
  there = rows_UM.reshape(-1) >= 0
  put = functools.partial(arrays.on_data, size=total, mesh=mesh)
  shape, sae = context.itself
  where = context.subject.config, context.site
  at_BS = np.minimum(at[:, None] + np.arange(TOKENS), tokens.shape[1] - 1)
  tokens, at, at_BS = map(put, (tokens, at, at_BS))
  raw_BTD, logits = ablating.read(*where, context.params, tokens, at_BS)
  _, without = ablating.logits_without(
    ablating.named, *where, shape, context.params, sae, tokens, raw_BTD, at,
    put(np.repeat(latents, n_examples).astype(np.int32)), at_BS,
  )  # fmt: skip
  out = _terms(
    mesh,
    (batch, n_examples),
    tokens,
    at,
    put(length),
    put(there),
    logits,
    without,
  )
  return Effects(*(arrays.to_host(of, count) for of in out))


def _text(context: Context, row: int) -> tuple[np.ndarray, int, int]:
  """The context of a row's token: tokens, the token's place, their number.

  What follows the token is cut where the predictions end. Of no row it is
  that of row 0.
  """
  store = context.store
  place = int(store.stream_index(max(row, 0), max(row, 0) + 1)[0])
  width = context.width
  at = int(store.stream(place, place + 1)[2][0])
  stop = min(place - at + width, store.manifest.n_stream)
  tokens, _, positions = store.stream(place - at, stop)
  starts = np.flatnonzero(positions[1:] == 0)
  length = int(starts[0]) + 1 if len(starts) else len(tokens)
  length = min(length, at + TOKENS + 1)
  padded = np.full(width, tokens[length - 1], np.int32)
  padded[:length] = tokens[:length]
  return padded, at, length


@functools.partial(jax.jit, static_argnums=(0, 1))
def _terms(mesh, shape, tokens_BT, at_B, length_B, there_B, logits, without):
  """Effects of latents from those on their examples, which follow each other.

  The last batch rows fill up the data shards.
  """
  log_p, new_log_p = map(jax.nn.log_softmax, (logits, without))
  place_BS = at_B[:, None] + jnp.arange(logits.shape[1])
  scored_BS = (place_BS + 1 < length_B[:, None]) & there_B[:, None]
  next_BS = jnp.minimum(place_BS + 1, tokens_BT.shape[1] - 1)
  next_BS1 = jnp.take_along_axis(tokens_BT, next_BS, axis=1)[:, :, None]

  def loss(log_p):
    return -jnp.take_along_axis(log_p, next_BS1, axis=2)[..., 0]

  def mean(of_BS):
    """Over the predictions of a latent's examples."""
    of_UX, scored_UX = (
      a[: shape[0] * shape[1]].reshape(shape[0], -1) for a in (of_BS, scored_BS)
    )
    count_U = jnp.maximum(scored_UX.sum(1), 1)
    return jnp.where(scored_UX, of_UX, 0).sum(1) / count_U

  kl_BS = (jnp.exp(log_p) * (log_p - new_log_p)).sum(-1)
  there_UM = there_B[: shape[0] * shape[1]].reshape(shape)

  def over_examples(of_BV):
    of_UMV = of_BV[: shape[0] * shape[1]].reshape(*shape, -1)
    total_UV = jnp.where(there_UM[:, :, None], of_UMV, 0).sum(1)
    return total_UV / jnp.maximum(there_UM.sum(1), 1)[:, None]

  fall_BV = (logits - without)[:, 0]
  fall_UV = over_examples(fall_BV - ordered.median(fall_BV)[:, None])
  change_UV = over_examples(jnp.exp(log_p[:, 0]) - jnp.exp(new_log_p[:, 0]))
  n_votes = min(VOTES, fall_UV.shape[1])
  _, raised = jax.lax.top_k(fall_UV, n_votes)
  up_changes, up = jax.lax.top_k(change_UV, n_votes)
  down_changes, down = jax.lax.top_k(-change_UV, n_votes)
  out = (
    mean(kl_BS),
    mean(loss(new_log_p) - loss(log_p)),
    raised,
    up,
    up_changes,
    down,
    -down_changes,
  )
  return arrays.whole(out, mesh)


def _agreement(context, latents, raised_UV):
  """Shares of votes that ablations find: the latent's own, and another's."""
  if not logit_lens.has_logits(context.site):
    return None
  rows_UD = context.decoder_rows(latents)
  votes = lens.votes(context.subject, context.site, rows_UD, VOTES)
  votes_UV = np.asarray(votes.up_ids_NV)

  def share(votes_UV):
    return np.array(
      [np.isin(own, found).mean() for own, found in zip(votes_UV, raised_UV)]
    )

  return share(votes_UV), share(np.roll(votes_UV, 1, axis=0))


def _columns(context, latents, effects: Effects) -> dict[str, np.ndarray]:
  """Columns of the feature table: of other latents there is nothing."""
  n_latents = context.itself.shape.config.n_latents

  def column(of_U, empty):
    out = np.full((n_latents, *of_U.shape[1:]), empty, of_U.dtype)
    out[latents] = of_U
    return out

  return {
    'effect_kl': column(effects.kl_U, np.nan),
    'effect_ce': column(effects.delta_ce_U, np.nan),
    'effect_up_ids': column(effects.up_UV, -1),
    'effect_up_changes': column(effects.up_changes_UV, 0),
    'effect_down_ids': column(effects.down_UV, -1),
    'effect_down_changes': column(effects.down_changes_UV, 0),
  }
