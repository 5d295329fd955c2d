"""The loss of the subject when it reads reconstructions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from sae_jax import autoencoder, progress
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax.checkpoint import Trained
from sae_jax.feed.rows import Rows
from sae_jax.subject import capture, sharding, splice, Subject


@dataclasses.dataclass(frozen=True)
class Downstream:
  """Next-token losses with and without the autoencoder, in nats.

  Attributes:
    ce: cross-entropy of the subject as it is.
    ce_spliced: with reconstructions in place of the activations.
    ce_zero: with zeros in their place.
    ce_mean: with the mean activation in their place.
    delta_ce: ce_spliced - ce.
    delta_ce_low: lower end of its 95 % interval over documents, as contexts of
      one document are alike; None for a single document.
    delta_ce_high: upper end.
    kl: mean KL(original || spliced) of the next-token distributions.
    ce_recovered: 1 - delta_ce / (ce_zero - ce); None if the two are equal.
    ce_recovered_mean: the same against ce_mean.
    predictions: number of next tokens that were scored.
    contexts: number of contexts they are in.
    documents: number of documents the contexts are of.
  """

  ce: float
  ce_spliced: float
  ce_zero: float
  ce_mean: float
  delta_ce: float
  delta_ce_low: float | None
  delta_ce_high: float | None
  kl: float
  ce_recovered: float | None
  ce_recovered_mean: float | None
  predictions: int
  contexts: int
  documents: int


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _losses(
  subject_config,
  site,
  sae_config,
  mesh,
  params,
  sae,
  mean_D,
  tokens_BT,
  kept_BT,
):
  """Cross-entropies [variant, B, T-1] and KL [B, T-1] of a batch."""
  contexts = sharding.tokens_sharding(mesh)
  tokens_BT = jax.lax.with_sharding_constraint(tokens_BT, contexts)
  raw_BTD = capture.capture(subject_config, params, tokens_BT, site)
  rows = mesh_lib.RULES.spec('BD')
  reconstruct = jax.shard_map(
    functools.partial(autoencoder.reconstruct, sae_config, axis='latent'),
    mesh=mesh,
    in_specs=(mesh_lib.specs(sae), rows),
    out_specs=rows,
  )
  flat_BD = raw_BTD.reshape(-1, raw_BTD.shape[-1])
  spliced_BTD = reconstruct(sae, flat_BD).reshape(raw_BTD.shape)

  def log_probs(replacement_BTD):
    mixed_BTD = jnp.where(kept_BT[:, :, None], replacement_BTD, raw_BTD)
    if site.name == 'resid_post':
      # All that follows reads the stream alone: half of the work.
      logits = splice.resume(subject_config, params, mixed_BTD, site)
    else:
      logits = splice.splice(
        subject_config, params, tokens_BT, site, lambda _: mixed_BTD
      )
    return jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))

  def cross_entropy(log_p):
    return -jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=2)[..., 0]

  original = log_probs(raw_BTD)
  spliced = log_probs(spliced_BTD)
  kl = (jnp.exp(original) * (original - spliced)).sum(-1)
  ce = [cross_entropy(original), cross_entropy(spliced)]
  ce.append(cross_entropy(log_probs(jnp.zeros_like(raw_BTD))))
  mean_BTD = jnp.broadcast_to(mean_D, raw_BTD.shape)
  ce.append(cross_entropy(log_probs(mean_BTD)))
  # Whole on every process, so that each can read it.
  return jax.lax.with_sharding_constraint(
    (jnp.stack(ce), kl), mesh_lib.sharding(mesh, '')
  )


def measure(
  trained: Trained,
  subject: Subject,
  store: Rows,
  n_tokens: int,
  mean_D: np.ndarray,
  batch_contexts: int = 4,
  mesh: jax.sharding.Mesh | None = None,
) -> Downstream:
  """Splices reconstructions into the subject on test documents.

  Only activations that the store keeps are replaced: position 0 and other
  attention sinks stay as they are, for all variants alike. Every next-token
  prediction of a context is scored, whether its own token was replaced or not.

  Args:
    trained: the autoencoder.
    subject: the model that the store was harvested from.
    store: gives the test documents' text and the masked tokens.
    n_tokens: the fewest tokens of text, or all that there are if fewer.
    mean_D: the mean raw activation, for mean-ablation.
    batch_contexts: contexts in one forward pass; on a mesh as many more as its
      data axis needs.
    mesh: where the autoencoder lies; None for one device.
  """
  mesh = mesh or mesh_lib.one_device()
  batch_contexts += -batch_contexts % mesh.shape['data']
  params = sharding.place(subject.config, subject.params, mesh)
  site = capture.parse_site(store.site)
  tokens_CT, length_C, kept_CT, document_C = store_lib.test_contexts(
    store, n_tokens
  )
  sums, counts = [], []
  with progress.bar(
    total=int(length_C.sum()), unit='tok', desc='splice'
  ) as bar:
    for start in range(0, len(tokens_CT), batch_contexts):
      take = slice(start, start + batch_contexts)
      # A short last batch is filled up, so that one program serves all.
      short = batch_contexts - len(tokens_CT[take])
      fill = ((0, short), (0, 0))
      length_B = np.pad(length_C[take], (0, short))
      ce, kl = _losses(
        subject.config,
        site,
        trained.config,
        mesh,
        params,
        trained.sae,
        np.asarray(mean_D, np.float32),
        np.pad(tokens_CT[take], fill),
        np.pad(kept_CT[take], fill),
      )
      scored_BT = np.arange(1, tokens_CT.shape[1]) < length_B[:, None]
      values = np.concatenate([np.asarray(ce), np.asarray(kl)[None]])
      values = np.where(scored_BT, values.astype(np.float64), 0).sum(-1)
      sums.append(values[:, : len(tokens_CT[take])])
      counts.append(scored_BT.sum(-1)[: len(tokens_CT[take])])
      bar.update(int(length_B.sum()))
  return _summary(
    np.concatenate(sums, axis=1), np.concatenate(counts), document_C
  )


def _interval(
  change_C: np.ndarray, count_C: np.ndarray, document_C: np.ndarray
) -> tuple[float, float] | tuple[None, None]:
  """95 % interval of the mean change per prediction, over documents.

  The jackknife of a ratio (Quenouille 1956), each document left out in turn,
  with Student's quantile. A percentile bootstrap of few documents is too
  narrow: of two it holds the truth in half of all cases.
  """
  documents, member_C = np.unique(document_C, return_inverse=True)
  n = len(documents)
  if n < 2:
    return None, None
  change, count = (
    np.bincount(member_C, change_C),
    np.bincount(member_C, count_C),
  )
  without = (change.sum() - change) / (count.sum() - count)
  error = np.sqrt((n - 1) * without.var())
  mean = change.sum() / count.sum()
  reach = special.stdtrit(n - 1, 0.975) * error
  return float(mean - reach), float(mean + reach)


def _recovered(delta: float, ablated_delta: float) -> float | None:
  """1 - delta / ablated_delta; None where the ablation costs nothing."""
  return 1 - delta / ablated_delta if ablated_delta else None


def _summary(
  sums_XC: np.ndarray, count_C: np.ndarray, document_C: np.ndarray
) -> Downstream:
  """The result, from each context's sums of the four losses and of the KL."""
  predictions = int(count_C.sum())
  ce, spliced, zero, mean, kl = (sums_XC.sum(1) / predictions).tolist()
  low, high = _interval(sums_XC[1] - sums_XC[0], count_C, document_C)
  return Downstream(
    ce=ce,
    ce_spliced=spliced,
    ce_zero=zero,
    ce_mean=mean,
    delta_ce=spliced - ce,
    delta_ce_low=low,
    delta_ce_high=high,
    kl=kl,
    ce_recovered=_recovered(spliced - ce, zero - ce),
    ce_recovered_mean=_recovered(spliced - ce, mean - ce),
    predictions=predictions,
    contexts=len(count_C),
    documents=len(np.unique(document_C)),
  )
