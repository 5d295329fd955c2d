"""What fires in a text, and what a latent is, for a person who asks."""

import collections
from collections.abc import Sequence
from concurrent import futures
import dataclasses
from typing import Any

import jax
import numpy as np

from sae_jax import checkpoint as checkpoint_lib
from sae_jax import errors
from sae_jax import subject as subject_lib
from sae_jax.features import explanations, results
from sae_jax.subject import capture
from sae_jax.subject.formats import tokenizer as tokenizer_lib

# Attention takes the square of it, and nobody reads more lines.
_MOST_TOKENS = 4096
# Tokens are padded to a multiple, so that few lengths are compiled.
_LENGTH_STEP = 64
# Pre-activations that are sorted at a time.
_SORTED = 2**24
_LABEL_TOKENS = 5
# The columns that a label is made of.
_LABEL = ('top_tokens', 'top_peak', 'vote_up_ids')
_READERS = 8  # threads: a bucket's latency, not its bandwidth, is the bound

_capture = jax.jit(capture.capture, static_argnums=(0, 3))


@dataclasses.dataclass(frozen=True)
class Label:
  """Tokens that say what a latent is about, as the page lists them.

  Attributes:
    tokens: those of its highest activations, most frequent first.
    votes: those whose logits its decoder row raises most.
  """

  tokens: tuple[str | bytes, ...]
  votes: tuple[str | bytes, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
  """The active latents of each token of a text.

  Attributes:
    tokens: the text of each token, or its bytes where they are not whole
      characters.
    latents_TK: the most active latents of each token, the strongest first, of
      two that are equal the lower; -1 where fewer are active.
    values_TK: their activations; 0 where fewer are active.
    active_T: number of active latents of each token.
    unseen: whether the first token is one that the store leaves out, at
      position 0, of whose kind the autoencoder has read none.
    labels: of each latent in `latents_TK`; empty without results of sae-probe.
  """

  tokens: tuple[str | bytes, ...]
  latents_TK: np.ndarray
  values_TK: np.ndarray
  active_T: np.ndarray
  unseen: bool
  labels: dict[int, Label]


@dataclasses.dataclass(frozen=True)
class Latent:
  """A latent of finished results.

  Attributes:
    report: the report of sae-probe.
    vocabulary: the text or bytes of each token.
    columns: the latent's entries of the feature table, by name.
    explained: its line of `features.explanations`; None if it has none.
  """

  report: dict[str, Any]
  vocabulary: list[str | bytes]
  columns: dict[str, np.ndarray]
  explained: dict[str, Any] | None = None


def explain(
  text: str,
  checkpoint: str | checkpoint_lib.Trained,
  workdir: str | None = None,
  subject: subject_lib.Subject | str = '',
  *,
  most: int = 8,
  average: bool = True,
) -> Explanation:
  """The active latents of each token of a text.

  The text is read as one context, which begins as those of the store do that
  the autoencoder was trained on.

  Args:
    text: the text.
    checkpoint: the autoencoder, or the workdir of its training run.
    workdir: finished results of sae-probe of it, for the labels; None for none.
    subject: the model, if it is loaded already, or where it is now; '' for
      where it was.
    most: latents of a token, K; 0 for all that are active.
    average: whether to take the moving average of a run's weights.

  Raises:
    UserError: if the text is empty or too long, the results are unfinished or
      of other weights, or the subject is not there or another.
  """
  trained = checkpoint
  if not isinstance(trained, checkpoint_lib.Trained):
    trained = checkpoint_lib.load(checkpoint, average=average)
  report = None
  if workdir is not None:
    report = results.read_report(workdir)
    check_same(trained, report, workdir)
  data = trained.metadata.dataset
  if not isinstance(subject, subject_lib.Subject):
    subject = subject_lib.load_recorded(
      data['subject'], data['weights_sha256'], subject
    )
  ids, n_first = _tokens(subject, text, data.get('bos', ''))
  raw_TD = _activations(subject, data['site'], ids)[n_first:]
  latents_TK, values_TK, active_T = _active(trained, raw_TD, most)
  vocabulary = tokenizer_lib.token_texts(subject.tokenizer)
  labels = {}
  if report is not None:
    shown = np.unique(latents_TK[latents_TK >= 0]).tolist()
    labels = {
      latent: _label(columns, vocabulary)
      for latent, columns in _columns(workdir, report, shown, _LABEL).items()
    }
  return Explanation(
    tokens=tuple(vocabulary[token] for token in ids[n_first:]),
    latents_TK=latents_TK,
    values_TK=values_TK,
    active_T=active_T,
    unseen=not n_first and bool(data.get('mask', {}).get('mask_first')),
    labels=labels,
  )


def read_latent(workdir: str, latent: int, subject: str = '') -> Latent:
  """A latent of finished results.

  Args:
    workdir: of sae-probe, local path or URL.
    latent: its number.
    subject: where the subject is now; '' for where it was.

  Raises:
    UserError: if the results are unfinished or have no such latent, or the
      subject is not there or another.
  """
  report = results.read_report(workdir)
  if not 0 <= latent < report['n_latents']:
    raise errors.UserError(
      f'{workdir} has no latent {latent}: give 0 to {report["n_latents"] - 1}'
    )
  columns = _columns(workdir, report, [latent])[latent]
  tokenizer = subject_lib.load_recorded_tokenizer(
    report['subject'], report.get('weights_sha256', ''), subject
  )
  explained = explanations.of_results(workdir, report).get(latent)
  return Latent(
    report, tokenizer_lib.token_texts(tokenizer), columns, explained
  )


def _columns(
  workdir: str,
  report: dict[str, Any],
  latents: Sequence[int],
  names: Sequence[str] | None = None,
) -> dict[int, dict[str, np.ndarray]]:
  """The entries of latents in columns of the feature table, None for all."""
  features = results.open_features(workdir, report)

  def read(latent):
    block = features.latents(latent, latent + 1, names)
    return {name: column[0] for name, column in block.items()}

  with futures.ThreadPoolExecutor(_READERS) as pool:
    return dict(zip(latents, pool.map(read, latents)))


def _label(
  columns: dict[str, np.ndarray], vocabulary: list[str | bytes]
) -> Label:
  peaks = columns['top_peak']
  rows = np.flatnonzero(peaks >= 0)
  at_peak = columns['top_tokens'][rows, peaks[rows]].tolist()
  votes = columns['vote_up_ids']
  frequent = collections.Counter(at_peak).most_common(_LABEL_TOKENS)
  return Label(
    tokens=tuple(vocabulary[token] for token, _ in frequent),
    votes=tuple(vocabulary[token] for token in votes[votes >= 0])[
      :_LABEL_TOKENS
    ],
  )


def check_same(
  trained: checkpoint_lib.Trained, report: dict[str, Any], workdir: str
) -> None:
  """Raises UserError unless results are of these weights."""
  made_from = report.get('made_from', {})
  if made_from.get('sae_fingerprint') != checkpoint_lib.fingerprint(
    trained.sae
  ):
    average = made_from.get('probe_config', {}).get('average')
    raise errors.UserError(
      f'{workdir} holds results of other weights (step '
      f'{made_from.get("step")}, average {average}) than those of the '
      f'checkpoint (step {trained.step}): give the checkpoint that it was made '
      'of, or run sae-probe on this one'
    )


def _tokens(
  subject: subject_lib.Subject, text: str, bos: str
) -> tuple[list[int], int]:
  """The ids of a text, and how many stand before it."""
  start = tokenizer_lib.context_start(subject.tokenizer, bos)
  first = [] if start is None else [start]
  ids = tokenizer_lib.encode(subject.tokenizer, text)
  if not ids:
    raise errors.UserError('text has no tokens: give one of a word at least')
  config = subject.config
  most = config.n_positions or config.context_length or _MOST_TOKENS
  most = min(most, _MOST_TOKENS) - len(first)
  if len(ids) > most:
    raise errors.UserError(
      f'text has {len(ids):,} tokens, {most:,} at most can be read at once: '
      'give a part of it'
    )
  return first + ids, len(first)


def _activations(
  subject: subject_lib.Subject, site: str, ids: list[int]
) -> np.ndarray:
  """The subject's activations at a site, [T, D]."""
  width = -(-len(ids) // _LENGTH_STEP) * _LENGTH_STEP
  most = subject.config.n_positions or width
  tokens_BT = np.full((1, min(width, most)), ids[-1], np.int32)
  tokens_BT[0, : len(ids)] = ids
  raw_BTD = _capture(
    subject.config, subject.params, tokens_BT, capture.parse_site(site)
  )
  return np.asarray(raw_BTD)[0, : len(ids)]


def _active(
  trained: checkpoint_lib.Trained, raw_TD: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """latents_TK, values_TK and active_T, see `Explanation`."""
  rows = max(1, _SORTED // trained.config.n_latents)
  parts = []
  for start in range(0, len(raw_TD), rows):
    codes = trained.encode(raw_TD[start : start + rows])
    values_TK, latents_TK = np.asarray(codes.values), np.asarray(codes.indices)
    order_TK = np.lexsort((latents_TK, -values_TK), axis=-1)
    values_TK = np.take_along_axis(values_TK, order_TK, 1)
    latents_TK = np.take_along_axis(latents_TK, order_TK, 1)
    active_T = (values_TK > 0).sum(1)
    kept = min(most or active_T.max(), values_TK.shape[1])
    parts.append((latents_TK[:, :kept], values_TK[:, :kept], active_T))
  widest = max(values_TK.shape[1] for _, values_TK, _ in parts)
  latents_TK, values_TK = (
    np.concatenate(
      [np.pad(p[i], ((0, 0), (0, widest - p[i].shape[1]))) for p in parts]
    )
    for i in (0, 1)
  )
  latents_TK = np.where(values_TK > 0, latents_TK, -1)
  return (
    latents_TK,
    np.maximum(values_TK, 0),
    np.concatenate([active_T for *_, active_T in parts]),
  )
