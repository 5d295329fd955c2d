"""What evaluations have in common: autoencoders, subject and test documents."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from sae_jax import autoencoder, errors, progress
from sae_jax import store as store_lib
from sae_jax.feed.rows import Rows
from sae_jax.probing.suite import arrays
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.figures import Sample
from sae_jax.probing.suite.scored import Scored
from sae_jax.store.contexts import Contexts
from sae_jax.subject import capture, sharding, Subject

# Every figure is of so many draws, whose spread tells what another seed gives.
DRAWS = 5
# Test tokens that are drawn from, at most: reading all of a corpus's text would
# take longer than the evaluations.
_POOL_TOKENS = 2_000_000
_MEAN_ROWS = 8192
# Consecutive rows of a document that are drawn together.
_RUN_ROWS = 128


class CannotMeasure(errors.UserError):
  """The data do not allow an evaluation; the others can go on."""


class Texts(NamedTuple):
  """Contexts that were drawn, C of them.

  Attributes:
    tokens_CT: int32, padded on the right with the context's last token.
    length_C: number of tokens of each.
    kept_CT: whether the store holds the token's activation.
    document_C: the document that each is of.
    draw_C: which draw it is of.
  """

  tokens_CT: np.ndarray
  length_C: np.ndarray
  kept_CT: np.ndarray
  document_C: np.ndarray
  draw_C: np.ndarray

  def part(self, start: int, stop: int) -> 'Texts':
    """Some of the contexts."""
    return Texts(*(of[start:stop] for of in self))


class Tokens(NamedTuple):
  """Tokens that were drawn of test documents, one of a context.

  Attributes:
    tokens_CT: see `Texts`.
    length_C: see `Texts`.
    kept_CT: see `Texts`.
    document_C: see `Texts`.
    draw_C: see `Texts`.
    at_C: the token's position, int32; the store holds its activation.
  """

  tokens_CT: np.ndarray
  length_C: np.ndarray
  kept_CT: np.ndarray
  document_C: np.ndarray
  draw_C: np.ndarray
  at_C: np.ndarray

  def part(self, start: int, stop: int) -> 'Tokens':
    """Some of the contexts."""
    return Tokens(*(of[start:stop] for of in self))


class DrawnRows(NamedTuple):
  """Rows that were drawn of test documents.

  Attributes:
    raw_BD: activations, float32.
    document_B: the document of each.
    draw_B: which draw it is of.
  """

  raw_BD: np.ndarray
  document_B: np.ndarray
  draw_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class Context:
  """What evaluations are given.

  Attributes:
    scored: the autoencoder and its controls, by name, itself first.
    subject: the model that the activations are of.
    store: its activations; figures are of test rows.
    mesh: axes ("data", "latent").
    mean_D: the mean raw training activation; of a transcoder of what it writes.
    seed: of what is drawn.
    size: 'quick' or 'all'.
    counts_N: on how many of the scan's rows each latent fires; None where no
      evaluation asks for it.
    max_N: its highest activation on them.
    top_rows: latents -> rows of their highest activations, the highest first,
      -1 for none; see `ScanResult.top_rows`.
    loss_curve: URL of a table of compute and loss, see `loss_curve.read`; empty
      for none.
    wordnet: folder of WordNet's files, see `wordnet.concepts`; empty for none.
    probed: figures of the report's tasks by name, see `task_scores`.
    probed_again: draw -> the same after another split, `task_scores.Scores`.
  """

  scored: Mapping[str, Scored]
  subject: Subject
  store: Rows
  mesh: Mesh
  mean_D: np.ndarray
  seed: int
  size: str
  counts_N: np.ndarray | None = None
  max_N: np.ndarray | None = None
  top_rows: Callable[[np.ndarray], np.ndarray] | None = None
  loss_curve: str = ''
  wordnet: str = ''
  probed: Mapping[str, dict[str, Any]] | None = None
  probed_again: Callable[[int], Mapping[str, dict[str, Any]]] | None = None

  @property
  def draws(self) -> int:
    """Samples that every figure is of."""
    return DRAWS

  @property
  def name(self) -> str:
    """Of the autoencoder itself among those scored."""
    return next(iter(self.scored))

  @property
  def itself(self) -> Scored:
    """The autoencoder itself."""
    return self.scored[self.name]

  @functools.cached_property
  def site(self) -> capture.Site:
    """Where in the subject the activations are."""
    return capture.parse_site(self.store.site)

  @functools.cached_property
  def params(self) -> dict:
    """The subject's parameters over the mesh."""
    return sharding.place(self.subject.config, self.subject.params, self.mesh)

  def rng(self, *names: str | int) -> np.random.Generator:
    """Random numbers of a purpose: the same whatever else was drawn."""
    words = [self.seed, *(_number(name) for name in names)]
    return np.random.default_rng(words)

  def texts(
    self, n_tokens: int, purpose: str = 'texts', split: str = 'test'
  ) -> Texts:
    """Contexts of documents, drawn at random without repetition.

    Args:
      n_tokens: the fewest tokens of a draw, or as many as there are.
      purpose: draws of other purposes are independent.
      split: 'test' or 'training' documents.

    Raises:
      CannotMeasure: if the test documents have fewer contexts than draws.
    """
    pool = self._pool(split)
    order = self.rng(purpose, split).permutation(len(pool.length_C))
    # Dealt out, so that each draw has its share of a small pool.
    chosen = []
    for draw in range(DRAWS):
      own = order[draw::DRAWS]
      enough = np.searchsorted(np.cumsum(pool.length_C[own]), n_tokens) + 1
      chosen.append(own[:enough])
    return Texts(*_taken(pool, chosen))

  def tokens(self, n: int, after: int, purpose: str) -> Tokens:
    """Tokens of test documents, at most one of a context, drawn at random.

    Args:
      n: how many of a draw, or as many as there are.
      after: tokens that must follow it in its context.
      purpose: see `texts`.

    Raises:
      CannotMeasure: if fewer contexts have such a token than there are draws.
    """
    pool = self._pool('test')
    position_T = np.arange(pool.tokens_CT.shape[1])
    able_CT = position_T + after < np.asarray(pool.length_C)[:, None]
    able_CT &= pool.kept_CT
    able = np.flatnonzero(able_CT.any(1))
    self._check_draws(len(able), f'contexts with {after} tokens after one')
    rng = self.rng(purpose)
    order = rng.permutation(able)
    chosen = [order[draw::DRAWS][:n] for draw in range(DRAWS)]
    able_CT = able_CT[np.concatenate(chosen)]
    at_C = np.where(able_CT, rng.random(able_CT.shape), -1).argmax(1)
    return Tokens(*_taken(pool, chosen), at_C.astype(np.int32))

  @functools.cached_property
  def made(self) -> dict[Any, Any]:
    """What evaluations have in common and is made once, by what it is."""
    return {}

  @functools.cached_property
  def _pools(self) -> dict:
    return {}

  def _pool(self, split: str) -> Contexts:
    """Contexts that are drawn from."""
    if split not in self._pools:
      kinds = {
        'test': store_lib.test_contexts,
        'training': store_lib.training_contexts,
      }
      pool = kinds[split](self.store, _POOL_TOKENS)
      self._check_draws(len(pool.length_C), 'contexts', split)
      self._pools[split] = pool
    return self._pools[split]

  def _check_draws(self, count: int, what: str, split: str = 'test') -> None:
    if count < DRAWS:
      raise CannotMeasure(
        f'the {split} documents of store {self.store.url} have {count} {what}, '
        f'{DRAWS} are the fewest that an evaluation draws: harvest more'
      )

  def rows(self, n_rows: int, purpose: str = 'rows') -> DrawnRows:
    """Activations of test documents, runs of rows drawn without repetition.

    Args:
      n_rows: the fewest of a draw, or as many as there are.
      purpose: see `texts`.

    Raises:
      CannotMeasure: if there are fewer runs than draws.
      UserError: if a row is not finite.
    """
    test = self.store.test_rows
    stop = min(test.stop, test.start + _POOL_TOKENS)
    place_R = self.store.stream_index(test.start, stop)
    first, last = int(place_R[0]), int(place_R[-1])
    document_R = self.store.stream(first, last + 1)[1][place_R - first]
    starts = _run_starts(document_R)
    self._check_draws(len(starts), f'documents or runs of {_RUN_ROWS} rows')
    ends = np.append(starts[1:], len(document_R))
    order = self.rng(purpose).permutation(len(starts))
    parts, documents, draws = [], [], []
    for draw in range(DRAWS):
      own = order[draw::DRAWS]
      enough = np.searchsorted(np.cumsum((ends - starts)[own]), n_rows) + 1
      for run in np.sort(own[:enough]):
        start, end = int(starts[run]), int(ends[run])
        parts.append(
          self.store.finite_rows(test.start + start, test.start + end)
        )
        documents.append(document_R[start:end])
        draws.append(np.full(end - start, draw))
    return DrawnRows(*map(np.concatenate, (parts, documents, draws)))

  def latents(self, n: int, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Latents drawn at random of those that fire, and the draw of each.

    Args:
      n: how many in a draw, or as many as there are.
      least: tokens on which one must fire.

    Raises:
      CannotMeasure: if fewer fire than there are draws.
    """
    able = np.flatnonzero(self.counts_N >= least)
    if len(able) < DRAWS:
      raise CannotMeasure(
        f'{len(able)} latents fire on {least} tokens or more, {DRAWS} are the '
        'fewest that an evaluation draws: probe more rows'
      )
    order = self.rng('latents').permutation(able)
    chosen = [order[draw::DRAWS][:n] for draw in range(DRAWS)]
    draws = np.repeat(np.arange(DRAWS), [len(own) for own in chosen])
    return np.concatenate(chosen), draws

  @functools.cached_property
  def width(self) -> int:
    """Tokens of the longest context."""
    length = self.store.manifest.context_length
    return length or int(self.store.positions().max()) + 1

  def decoder_rows(self, latents: np.ndarray) -> np.ndarray:
    """Decoder rows of some latents, [U, D], on every process."""
    shape, sae = self.itself
    return arrays.to_host(_decoder_rows(shape, sae.w_dec_ND, latents))

  def chosen_on(self, rows: int) -> np.ndarray:
    """The first validation rows, at most so many, for what is fitted."""
    validation = self.store.validation_rows
    stop = min(validation.stop, validation.start + rows)
    return self.store.finite_rows(validation.start, stop)

  def mean(self, name: str) -> np.ndarray:
    """The mean of what an autoencoder reconstructs of validation rows."""
    shape, sae = self.scored[name]
    tokens_BX, _ = autoencoder.tokens(
      shape.config, sae, self.chosen_on(_MEAN_ROWS)
    )
    _, target_BD = autoencoder.halves(shape.config, tokens_BX)
    return np.asarray(target_BD, np.float64).mean(0).astype(np.float32)

  def sums_of_rows(
    self,
    drawn: DrawnRows,
    batch_rows: int,
    terms: Callable[[str, Scored, jax.Array], dict[str, jax.Array]],
    desc: str,
  ) -> dict[str, Sample]:
    """What each row adds to the sums of each autoencoder.

    Args:
      drawn: the rows.
      batch_rows: rows at a time.
      terms: an autoencoder's name, itself and a batch of raw rows -> arrays by
        term, whole on every process, one entry for each row.
      desc: label of the progress bar.
    """
    samples = {}
    total = len(self.scored) * len(drawn.raw_BD)
    with progress.bar(total=total, unit='tok', desc=desc) as bar:
      for name, scored in self.scored.items():
        parts = []
        for start, stop in arrays.batches(
          batch_rows, len(drawn.raw_BD), self.mesh
        ):
          raw_BD = arrays.on_data(
            drawn.raw_BD[start:stop], batch_rows, self.mesh
          )
          out = terms(name, scored, raw_BD)
          parts.append(
            {t: arrays.to_host(a, stop - start) for t, a in out.items()}
          )
          bar.update(stop - start)
        samples[name] = Sample(drawn.document_B, drawn.draw_B, joined(parts))
    return samples


@functools.partial(jax.jit, static_argnums=0)
def _decoder_rows(shape, w_dec_ND, latents):
  return arrays.whole(scored_lib.rows(shape, w_dec_ND, latents), shape.mesh)


def _taken(pool, chosen: list[np.ndarray]) -> list[np.ndarray]:
  """The chosen contexts of a pool, by draw, and the draw of each."""
  draws = np.repeat(np.arange(len(chosen)), list(map(len, chosen)))
  places = np.concatenate(chosen)
  return [*(of[places] for of in pool), draws]


def _run_starts(document_R: np.ndarray) -> np.ndarray:
  """Where runs of rows begin: at each document, and within a long one."""
  begins_R = np.append(True, document_R[1:] != document_R[:-1])
  first_R = np.maximum.accumulate(
    np.where(begins_R, np.arange(len(document_R)), 0)
  )
  within_R = np.arange(len(document_R)) - first_R
  return np.flatnonzero(within_R % _RUN_ROWS == 0)


def _number(name: str | int) -> int:
  """A number of a purpose."""
  if isinstance(name, int):
    return name
  return int.from_bytes(name.encode(), 'little') % 2**64


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The sums of all batches, by term, float64."""
  return {
    term: np.concatenate([part[term] for part in parts]).astype(np.float64)
    for term in parts[0]
  }


def samples(
  drawn: Texts | Tokens, parts: dict[str, list[dict[str, np.ndarray]]]
) -> dict[str, Sample]:
  """Samples by name, of the sums of all batches of contexts."""
  return {
    name: Sample(drawn.document_C, drawn.draw_C, joined(of))
    for name, of in parts.items()
  }
