"""The loss of the subject when it reads reconstructions."""

import dataclasses

import jax
import numpy as np

from sae_jax import mesh as mesh_lib
from sae_jax import progress
from sae_jax import store as store_lib
from sae_jax.checkpoint import Trained
from sae_jax.feed.rows import Rows
from sae_jax.probing import intervals, splicing
from sae_jax.subject import capture, sharding, Subject


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
    mean_D: the mean raw activation, for mean-ablation; of a transcoder that of
      what it writes.
    batch_contexts: contexts in one forward pass; on a mesh as many more as its
      data axis needs.
    mesh: where the autoencoder lies; None for one device.
  """
  mesh = mesh or mesh_lib.one_device()
  batch_contexts += -batch_contexts % mesh.shape['data']
  params = sharding.place(subject.config, subject.params, mesh)
  written = trained.config.target_site or store.site
  read, written = map(capture.parse_site, (store.site, written))
  tokens_CT, length_C, kept_CT, document_C = store_lib.test_contexts(
    store, n_tokens
  )
  mean_D = np.asarray(mean_D, np.float32)
  where = subject.config, written, mesh, params
  reconstruct = splicing.reconstruction(trained.config, mesh)

  def losses(tokens_BT, kept_BT):
    """Losses as they are, spliced, with zeros, with the mean; and KL."""
    raw_BTD, log_p_BTV, ce = splicing.read(*where, tokens_BT)
    read_BTD = raw_BTD
    if read != written:
      read_BTD = splicing.activations(
        subject.config, read, mesh, params, tokens_BT
      )

    def replaced(new_BTD):
      return splicing.losses(
        *where, tokens_BT, raw_BTD, log_p_BTV, new_BTD, kept_BT
      )

    spliced, kl = replaced(reconstruct(trained.sae, read_BTD))
    zero, mean = (
      replaced(new_D)[0] for new_D in (np.zeros_like(mean_D), mean_D)
    )
    return ce, spliced, zero, mean, kl

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
      batch = np.pad(tokens_CT[take], fill), np.pad(kept_CT[take], fill)
      values = [np.asarray(a) for a in losses(*batch)]
      scored_BT = np.arange(1, tokens_CT.shape[1]) < length_B[:, None]
      values = np.where(scored_BT, np.float64(values), 0).sum(-1)
      sums.append(values[:, : len(tokens_CT[take])])
      counts.append(scored_BT.sum(-1)[: len(tokens_CT[take])])
      bar.update(int(length_B.sum()))
  return _summary(
    np.concatenate(sums, axis=1), np.concatenate(counts), document_C
  )


def _interval(
  change_C: np.ndarray, count_C: np.ndarray, document_C: np.ndarray
) -> tuple[float, float] | tuple[None, None]:
  """95 % interval of the mean change per prediction, over documents."""
  _, sums = intervals.by_unit(
    document_C, {'change': change_C, 'count': count_C}
  )
  _, low, high = intervals.jackknife(
    lambda sums: sums['change'] / sums['count'], sums
  )
  return (None, None) if np.isnan(low) else (float(low), float(high))


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
