"""The texts by which each latent is explained, and those it is scored on.

A text is a window; it is active if the latent is active on one of its rows. Of
the active ones of a side the one of rank r among c, the highest first, is in
tenth 9 - 10 r // c, so that tenth 0 holds the lowest. No text stands twice
among those of a latent, on whichever side.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
from typing import Any

import numpy as np

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.explaining import windows as windows_lib
from sae_jax.explaining.config import Protocol
from sae_jax.explaining.windows import Windows

TENTHS = 10
TENTH, RANDOM, NEAR, TOKEN = 'tenth', 'random', 'near', 'token'
# What negatives are, by the class of texts.
NEGATIVES = {
  RANDOM: 'random texts without activations',
  NEAR: 'texts on which it is nearest to being active',
  TOKEN: 'texts with its most frequent token, on which it is not active',
}
# Why a latent is skipped.
FEW, DENSE = 'few_active_texts', 'few_inactive_texts'


@dataclasses.dataclass(frozen=True)
class Text:
  """A text of a latent.

  Attributes:
    kind: TENTH for an active one, or a key of NEGATIVES.
    tenth: of an active one; -1 of others.
    document: number of its document.
    tokens: its tokens.
    acts: the latent's activation on each.
  """

  kind: str
  tenth: int
  document: int
  tokens: tuple[int, ...]
  acts: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Drawn:
  """The texts of a latent.

  Attributes:
    latent: its number.
    skipped: why it has none; '' if it has.
    shown: active ones that the explainer reads, the highest first.
    near: inactive ones that it reads.
    scored: those that the explanation is scored on.
    tokens: on which it is active most often among the explainer's documents.
  """

  latent: int
  skipped: str
  shown: tuple[Text, ...] = ()
  near: tuple[Text, ...] = ()
  scored: tuple[Text, ...] = ()
  tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Places:
  """The windows of a latent's texts, before their activations are known.

  Attributes:
    drawn: without texts.
    shown: window, kind and tenth of each; see `Drawn`.
    near: likewise.
    scored: likewise.
  """

  drawn: Drawn
  shown: tuple[tuple[int, str, int], ...] = ()
  near: tuple[tuple[int, str, int], ...] = ()
  scored: tuple[tuple[int, str, int], ...] = ()

  def all(self) -> Iterator[int]:
    """The windows."""
    return (place[0] for place in self.shown + self.near + self.scored)


def places(
  protocol: Protocol,
  least: int,
  windows: Windows,
  latent: int,
  peak_W: np.ndarray,
  near_W: np.ndarray,
  tokens: np.ndarray,
  seed: int,
) -> Places:
  """Draws the texts of a latent.

  Args:
    protocol: how many.
    least: active texts of each side, and inactive ones to score, without which
      it is skipped.
    windows: all of them.
    latent: its number, which the draw depends on, and on no other latent.
    peak_W: its highest activation on each window.
    near_W: its highest pre-activation.
    tokens: see `Drawn`.
    seed: of the draw.
  """
  active_W = peak_W > 0
  sides = [
    [
      np.flatnonzero((windows.side_W == side) & (active_W == on))
      for on in (1, 0)
    ]
    for side in (windows_lib.EXPLAINER, windows_lib.SCORER)
  ]
  (shown, not_shown), (positives, negatives) = sides
  if min(len(shown), len(positives)) < least:
    return Places(Drawn(latent, FEW))
  if len(negatives) < least:
    return Places(Drawn(latent, DENSE))
  draw = _Draw(windows, near_W, np.random.default_rng([seed, latent]))
  tenths = _tenths(shown, peak_W)
  top = draw.pick(np.concatenate(tenths[::-1]), protocol.top, apart=True)
  shown = [(window, TENTH, _tenth_of(window, tenths)) for window in top]
  for tenth in reversed(range(TENTHS)):
    own = draw.random(tenths[tenth], protocol.of_tenth)
    shown += [(window, TENTH, tenth) for window in own]
  near = [(w, NEAR, -1) for w in draw.nearest(not_shown, protocol.near)]
  scored = []
  for tenth, own in enumerate(_tenths(positives, peak_W)):
    own = draw.random(own, protocol.scored_of_tenth)
    scored += [(window, TENTH, tenth) for window in own]
  if not scored:
    # All have the wording of what the explainer reads.
    return Places(Drawn(latent, FEW))
  n_active = len(scored)
  with_token = _with_token(windows, negatives, tokens[:1])
  for kind, own in (
    (RANDOM, draw.random(negatives, protocol.scored_random)),
    (NEAR, draw.nearest(negatives, protocol.scored_near)),
    (TOKEN, draw.random(with_token, protocol.scored_token)),
  ):
    scored += [(window, kind, -1) for window in own]
  if len(scored) == n_active:
    return Places(Drawn(latent, DENSE))
  drawn = Drawn(latent, '', tokens=tuple(tokens.tolist()))
  return Places(drawn, tuple(shown), tuple(near), tuple(scored))


class _Draw:
  """Takes windows in some order whose text was not taken before."""

  def __init__(self, windows: Windows, near_W: np.ndarray, rng):
    self._windows, self._near_W, self._rng = windows, near_W, rng
    self._taken = set()

  def random(self, candidates: np.ndarray, count: int) -> list[int]:
    """Some of them at random."""
    return self.pick(self._rng.permutation(candidates), count)

  def nearest(self, candidates: np.ndarray, count: int) -> list[int]:
    """Those with the highest pre-activations."""
    order = np.argsort(-self._near_W[candidates], kind='stable')
    return self.pick(candidates[order], count)

  def pick(
    self, candidates: Iterable[int], count: int, apart: bool = False
  ) -> list[int]:
    """The first of them; `apart` for one of a document."""
    picked, documents = [], set()
    for window in map(int, candidates):
      if len(picked) == count:
        break
      document = int(self._windows.document_W[window])
      text = self._windows.tokens(window).tobytes()
      if text in self._taken or (apart and document in documents):
        continue
      self._taken.add(text)
      documents.add(document)
      picked.append(window)
    return picked


def _tenths(active: np.ndarray, peak_W: np.ndarray) -> list[np.ndarray]:
  """Active windows by tenth, the lowest first, in each the highest first."""
  best = active[np.argsort(-peak_W[active], kind='stable')]
  tenth = TENTHS - 1 - TENTHS * np.arange(len(best)) // len(best)
  return [best[tenth == number] for number in range(TENTHS)]


def _tenth_of(window: int, tenths: list[np.ndarray]) -> int:
  return next(i for i, own in enumerate(tenths) if window in own)


def _with_token(windows, candidates, tokens):
  """Those windows that have one of some tokens."""
  has_L = np.isin(windows.tokens_L, tokens)
  before = np.append(0, np.cumsum(has_L))
  start, stop = windows.start_W[candidates], windows.stop_W[candidates]
  return candidates[before[stop] > before[start]]


def filled(
  place: Places, windows: Windows, acts: Mapping[int, np.ndarray]
) -> Drawn:
  """The texts themselves, from activations by window."""

  def text(window, kind, tenth):
    return Text(
      kind,
      tenth,
      int(windows.document_W[window]),
      tuple(windows.tokens(window).tolist()),
      tuple(float(f'{act:.4g}') for act in acts[window].tolist()),
    )

  return dataclasses.replace(
    place.drawn,
    **{
      name: tuple(text(*one) for one in getattr(place, name))
      for name in ('shown', 'near', 'scored')
    },
  )


def check_split(drawn: Iterable[Drawn]) -> None:
  """Raises DefectError if a document is on both sides."""
  shown, scored = set(), set()
  for one in drawn:
    shown |= {text.document for text in one.shown + one.near}
    scored |= {text.document for text in one.scored}
  if shown & scored:
    raise errors.DefectError(
      f'{len(shown & scored)} documents, such as {min(shown & scored)}, are '
      'both explained and scored by'
    )


def to_lines(drawn: Iterable[Drawn]) -> list[dict[str, Any]]:
  """A JSON mapping for each latent."""
  return [config_lib.through_json(dataclasses.asdict(one)) for one in drawn]


def from_lines(lines: Iterable[dict[str, Any]], name: str) -> list[Drawn]:
  """The inverse of `to_lines`.

  Raises:
    UserError: if a line is not one of them.
  """
  return [config_lib.from_dict(Drawn, line, name) for line in lines]
