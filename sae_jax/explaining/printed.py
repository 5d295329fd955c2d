"""A report of explanations as lines for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from sae_jax.explaining import answers, asking, client, requests
from sae_jax.explaining.run import Waiting

_REASONS = {
  **answers.FAILURES,
  **client.FAILURES,
  asking.UNANSWERED: 'no answer was given',
}
_NEXT = {
  requests.EXPLAIN: 'the requests of detection',
  requests.DETECT: 'the scores',
}
_SHOWN = 3


def waiting_line(waiting: Waiting) -> str:
  """What to do with requests that are written."""
  return (
    f'{waiting.count:,} requests ({waiting.kind}) are in '
    f'{waiting.folder}/{requests.REQUESTS}: answer them with any tool, a line '
    f'{{"id", "content"}} for each in {requests.RESPONSES} beside it, and give '
    f'the same command again for {_NEXT[waiting.kind]}'
  )


def lines(report: Mapping[str, Any]) -> Iterator[str]:
  """The summary of a report: scores, controls and what is not scored."""
  counts, figures = report['counts'], report['figures']
  few, dense = counts['skipped'].values()
  yield (
    f'{counts["latents"]} latents: {counts["scored"]} scored, '
    f'{counts["explained"]} explained, {few} skipped with too few active '
    f'texts and {dense} with too few inactive ones'
    + _of_mass(counts['skipped_mass'])
  )
  for name, title in (
    ('balanced_accuracy', 'balanced accuracy'),
    ('auroc', 'AUROC'),
    ('sensitivity', 'sensitivity'),
    ('specificity', 'specificity'),
  ):
    yield f'{title:<42} {_figure(figures[name])}'
  yield f'{"balanced accuracy, over documents":<42} ' + _figure(
    figures['by_document']
  )
  tenths = ' '.join(_short(of) for of in figures['by_tenth'])
  yield f'{"sensitivity by tenth, the lowest first":<42} {tenths}'
  for kind, of in figures['by_class'].items():
    yield f'{f"specificity on {kind} texts":<42} {_figure(of)}'
  controls = report['controls']
  for name, title in (
    ('other', "another latent's explanation"),
    ('tokens', 'its tokens, no model'),
  ):
    for figure, word in (('balanced_accuracy', ''), ('auroc', ', AUROC')):
      of = controls[name][figure]
      yield f'{title + word:<42} {_figure(of)}{_above(of)}'
  if controls['compared']:
    of = controls['compared']['balanced_accuracy']
    other = (
      ''
      if controls['compared']['same_protocol']
      else ('; by another model or protocol: not comparable')
    )
    yield f'{"the compared workdir":<42} {_figure(of)}{_above(of)}{other}'
  yield f'{"agreement of two orders":<42} {_figure(figures["consistency"])}'
  yield from _failures(report)
  for title, name in (('best', 'best'), ('worst', 'worst')):
    for entry in report['ranked'][name][:_SHOWN]:
      yield (
        f'{title} {entry["latent"]:>8} {entry["shrunk"]:.2f}  '
        f'{entry["explanation"]}'
      )


def _of_mass(share) -> str:
  if share is None:
    return ''
  return f' ({100 * share:.1f} % of the activation mass skipped)'


def _failures(report) -> Iterator[str]:
  for kind, of in report['failures'].items():
    if of is None:
      continue
    failed = sum(of['by_kind'].values())
    yield f'{kind}: {of["asked"]:,} requests, {failed:,} not answered'
    for name, count in of['by_kind'].items():
      yield f'  {count:>8,} {name}: {_REASONS[name]}'
  share = report['own_probabilities']
  if share is not None:
    yield (
      f"probabilities are the model's own in {100 * share:.0f} % of the "
      'answers, 0 or 1 in the others'
    )


def _figure(of) -> str:
  if of['value'] is None:
    return 'none'
  if of['low'] is None:
    return f'{of["value"]:.3f}'
  return f'{of["value"]:.3f} [{of["low"]:.3f}, {of["high"]:.3f}]'


def _short(of) -> str:
  return 'none' if of['value'] is None else f'{of["value"]:.2f}'


def _above(of) -> str:
  above = of['above']
  return '' if above is None else f'; explanations are {_figure(above)} above'
