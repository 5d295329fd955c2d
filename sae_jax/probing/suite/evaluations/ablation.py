"""How sparse the effect of a single latent is on what follows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.ops.top_k import ordered
from sae_jax.probing.suite import ablating, arrays
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import ratio, SHARE, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = 'Sparsity of effects'
ABOUT = """One active latent of one token is taken out of the activation, and
everything else, the autoencoder's error too, is left as it was. The change of
the logits of this and the next fifteen predictions, less the median change of
each prediction, is a vector of vocabulary size times sixteen. (L1 / L2)^2 of it
counts how many entries it would have if all were equal; as a share of all
entries it is near 1 for a diffuse effect and near 0 for one on few tokens.

Tokens are drawn from test documents, and the latent from those active there,
each with the same chance. Gao et al. (2024), section 4.4."""
UNIT = 'documents'
ONE_SITE = True
TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured; tokens of each draw at which a latent is taken out."""

  ablations: int
  batch_contexts: int = 4


SIZES = {'quick': Size(10), 'all': Size(400)}

STATISTICS = {
  'sparsity': Statistic(
    'share of logits affected',
    '(L1 / L2)^2 of the change of logits, as a share of vocabulary times '
    f'{TOKENS} predictions; mean over ablations.',
    ratio('sparsity', 'ablations'),
    better='low',
    ends=SHARE,
    orders=True,
  ),
  'kl': Statistic(
    'KL of an ablation',
    'Mean KL divergence of the predictions without the latent from those with '
    f'it, over {TOKENS} predictions.',
    ratio('kl', 'ablations'),
    'nats',
  ),
  'delta_ce': Statistic(
    'delta CE of an ablation',
    'How much higher the cross-entropy of a next token is without the latent, '
    f'mean over {TOKENS} predictions.',
    ratio('delta_ce', 'ablations'),
    'nats',
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  drawn = context.tokens(size.ablations, TOKENS, 'ablation')
  chance_C = context.rng('ablated').random(len(drawn.at_C), np.float32)
  where = context.subject.config, context.site

  def terms(tokens, at, chance):
    at_BS = at[:, None] + np.arange(TOKENS)
    raw_BTD, logits = ablating.read(*where, context.params, tokens, at_BS)
    for name, (shape, sae) in context.scored.items():
      taken, without = ablating.logits_without(
        ablating.active, *where, shape, context.params, sae, tokens, raw_BTD,
        at, chance, at_BS,
      )  # fmt: skip
      of = _terms(context.mesh, tokens, at, taken.vals_B, logits, without)
      yield name, of

  return Outcome(
    ablating.samples(
      context, drawn, chance_C, size.batch_contexts, terms, 'ablation'
    )
  )


@functools.partial(jax.jit, static_argnums=0)
def _terms(mesh, tokens_BT, at_B, vals_B, logits_BSV, without_BSV):
  """What each ablation adds; nothing where the token had no latent."""
  log_p, new_log_p = map(jax.nn.log_softmax, (logits_BSV, without_BSV))
  next_BS1 = jnp.take_along_axis(
    tokens_BT, at_B[:, None] + 1 + jnp.arange(logits_BSV.shape[1]), axis=1
  )[:, :, None]
  loss_BS = (
    jnp.take_along_axis(log_p, next_BS1, axis=2)
    - jnp.take_along_axis(new_log_p, next_BS1, axis=2)
  )[..., 0]
  is_there_B = vals_B > 0
  terms = {
    'sparsity': affected(without_BSV - logits_BSV),
    'kl': (jnp.exp(log_p) * (log_p - new_log_p)).sum(-1).mean(-1),
    'delta_ce': loss_BS.mean(-1),
    'ablations': jnp.ones_like(vals_B),
  }
  terms = {t: jnp.where(is_there_B, of, 0) for t, of in terms.items()}
  return arrays.whole(terms, mesh)


def affected(change_BSV: jax.Array) -> jax.Array:
  """(L1 / L2)^2 of changes of logits over their number, [B].

  The median of each prediction is subtracted first: what is added to all
  logits changes nothing. 0 where nothing changes.
  """
  median_BS1 = ordered.median(change_BSV)[..., None]
  change_BX = (change_BSV - median_BS1).reshape(len(change_BSV), -1)
  square_B = (change_BX**2).sum(-1)
  total_B = jnp.abs(change_BX).sum(-1)
  safe_B = jnp.where(square_B > 0, square_B, 1)
  return total_B**2 / safe_B / change_BX.shape[1]
