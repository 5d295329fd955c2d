"""The subject's loss when it reads reconstructions."""

import dataclasses

import numpy as np

from sae_jax import progress
from sae_jax.probing import splicing
from sae_jax.probing.suite import arrays, loss_curve
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import divided, ratio, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = "The subject's loss on reconstructions"
ABOUT = """The subject reads test documents while its activations are replaced
by the autoencoder's reconstructions, and predicts each next token. What the
reconstruction lacks shows as a higher cross-entropy (delta CE) and as another
distribution of the next token (KL). The losses with zeros and with the mean
activation in their place say what an autoencoder that knows nothing would cost.
With --loss_curve the loss is also told as the training compute of a model that
has it.

Activations that the store leaves out, as the first token's of a context, stay
as they are; figures "with all tokens" replace them too. Gao et al., "Scaling
and evaluating sparse autoencoders" (2024), section 4.1."""
UNIT = 'documents'
ONE_SITE = True
OPTIONS = ('loss_curve',)


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured; of each draw."""

  tokens: int
  batch_contexts: int = 4


SIZES = {'quick': Size(512), 'all': Size(8192)}


def _recovered(ablated):
  return lambda sums: (
    1 - divided(sums['spliced'] - sums['ce'], sums[ablated] - sums['ce'])
  )


def _delta(spliced, count='predictions'):
  return lambda sums: divided(sums[spliced] - sums['ce'], sums[count])


STATISTICS = {
  'ce': Statistic(
    'CE of the subject',
    'Cross-entropy of the next token as the subject is.',
    ratio('ce', 'predictions'),
    'nats',
  ),
  'delta_ce': Statistic(
    'delta CE',
    'Cross-entropy with reconstructions in place of the activations, less that '
    'of the subject as it is.',
    _delta('spliced'),
    'nats',
    'low',
    orders=True,
  ),
  'kl': Statistic(
    'KL',
    'Mean KL divergence of the next-token distribution with reconstructions '
    'from the original one.',
    ratio('kl', 'predictions'),
    'nats',
    'low',
    orders=True,
  ),
  'recovered_zero': Statistic(
    'CE recovered, zeros',
    'Share of the loss that zeros in place of the activations cost, and the '
    'reconstructions do not.',
    _recovered('zero'),
    better='high',
    orders=True,
  ),
  'recovered_mean': Statistic(
    'CE recovered, mean',
    'The same of the loss that the mean activation costs.',
    _recovered('mean'),
    better='high',
    orders=True,
  ),
  'delta_ce_all': Statistic(
    'delta CE, all tokens',
    'delta CE with the tokens replaced too whose activations the store leaves '
    'out, such as the first of each context.',
    _delta('spliced_all'),
    'nats',
    'low',
    orders=True,
  ),
  'delta_ce_by_position': Statistic(
    'delta CE by position',
    'delta CE of the predictions made at each position of a context, averaged '
    'over positions that are neighbours.',
    lambda sums: divided(
      sums['spliced_position'] - sums['ce_position'],
      sums['count_position'],
    ),
    'nats',
    'low',
    points='position',
  ),
}
# Places of the curve, at most.
_PLACES = 16


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  texts = context.texts(size.tokens)
  length = texts.tokens_CT.shape[1]
  # Which place of the curve each position is of.
  places = min(_PLACES, length - 1)
  place_T = np.arange(length - 1) * places // (length - 1)
  is_place_TP = place_T[:, None] == np.arange(places)
  parts = {name: [] for name in context.scored}
  with progress.bar(
    total=int(texts.length_C.sum()), unit='tok', desc='downstream'
  ) as bar:
    for start, stop in arrays.batches(
      size.batch_contexts, len(texts.length_C), context.mesh
    ):
      batch = texts.part(start, stop)
      terms = _terms(context, batch, size.batch_contexts, is_place_TP)
      for name, of in terms.items():
        parts[name].append(of)
      bar.update(int(batch.length_C.sum()))
  return Outcome(
    context_lib.samples(texts, parts),
    {
      'position': np.array(
        [np.flatnonzero(is_T).mean() for is_T in is_place_TP.T]
      )
    },
    _compute(context.loss_curve),
  )


def _compute(url: str) -> dict[str, Statistic]:
  """The figure that follows from a table of losses of the subject's family."""
  if not url:
    return {}
  worth = loss_curve.read(url)

  def share(sums):
    ends = [ratio(name, 'predictions')(sums) for name in ('spliced', 'ce')]
    return divided(*map(worth, ends))

  return {
    'compute': Statistic(
      'compute left',
      'Training compute of a model that has the loss of the subject on '
      "reconstructions, as a share of that with the subject's own loss.",
      share,
      better='high',
    )
  }


def _terms(context, batch, size, is_place_TP):
  """What each context adds to the sums of each autoencoder."""
  mesh, mean_D = context.mesh, np.asarray(context.mean_D, np.float32)
  where = context.subject.config, context.site, mesh, context.params
  tokens, kept = (
    arrays.on_data(of, size, mesh) for of in (batch.tokens_CT, batch.kept_CT)
  )
  everywhere = np.ones(tokens.shape, bool)
  count, length = batch.tokens_CT.shape
  scored_BT = np.arange(1, length) < batch.length_C[:, None]
  raw_BTD, log_p_BTV, ce = splicing.read(*where, tokens)

  def replaced(new_BTD, replaced_BT):
    """Losses and KL of the scored predictions; 0 at the others."""
    out = splicing.losses(
      *where, tokens, raw_BTD, log_p_BTV, new_BTD, replaced_BT
    )
    return [scored(of_BT) for of_BT in out]

  def scored(of_BT):
    of_BT = arrays.to_host(of_BT, count).astype(np.float64)
    return np.where(scored_BT, of_BT, 0)

  zero_BT, mean_BT = (
    replaced(of_D, kept)[0] for of_D in (np.zeros_like(mean_D), mean_D)
  )
  ce_BT = scored(ce)
  common = {
    'ce': ce_BT.sum(1),
    'zero': zero_BT.sum(1),
    'mean': mean_BT.sum(1),
    'predictions': scored_BT.sum(1),
    'ce_position': ce_BT @ is_place_TP,
    'count_position': scored_BT.astype(np.float64) @ is_place_TP,
  }
  terms = {}
  for name, (shape, sae) in context.scored.items():
    new_BTD = splicing.reconstruction(shape.config, mesh)(sae, raw_BTD)
    spliced_BT, kl_BT = replaced(new_BTD, kept)
    all_BT, _ = replaced(new_BTD, everywhere)
    terms[name] = common | {
      'spliced': spliced_BT.sum(1),
      'kl': kl_BT.sum(1),
      'spliced_all': all_BT.sum(1),
      'spliced_position': spliced_BT @ is_place_TP,
    }
  return terms
