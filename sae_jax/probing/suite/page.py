"""The report of the suite: one HTML file for a reader who is new to it."""

from collections.abc import Mapping
from typing import Any

from sae_jax.drawing import page
from sae_jax.probing.suite import plots

_READING = (
  'Every figure is of test text, which the autoencoder was not trained on and '
  'nothing was chosen by. In brackets is its 95 % interval: how far it might '
  'lie from its value on other documents (or latents, where it says so). '
  '"Smallest difference" is what two measurements of this size must differ by '
  'to be told apart; it follows from five independent draws. A figure that '
  'cannot be told from that of a control is marked with the name of it. The '
  'summary has the figures that tell a true dictionary from a trained one, and '
  'that from a random one, where the truth is known; the others stand below.'
)


def html(
  about: Mapping[str, Any],
  records: Mapping[str, dict[str, Any]],
  controls: Mapping[str, str],
) -> str:
  """The report.

  Args:
    about: subject, site, n_latents, k, activation of the autoencoder.
    records: what was measured, by the name of the evaluation.
    controls: what each control is, by name.
  """
  parts = [_about(about, controls), '<h2>Summary</h2>', _summary(records)]
  for name, record in records.items():
    parts += _evaluation(name, record)
  title = f'Autoencoder of {about["site"]}'
  if about.get('target_site'):
    title = f'Transcoder of {about["site"]} to {about["target_site"]}'
  return page.document(title, parts)


def _about(about, controls) -> str:
  active = f'{about["k"]} active a token'
  if about['activation'] != 'topk':
    active = about['activation']
  lines = [
    f'<p>{about["n_latents"]:,} latents, {page.text(active)}, of '
    f'{page.text(about["site"])} of {page.text(about["subject"])}.</p>',
    f'<p>{page.text(_READING)}</p>',
    '<p>The same is measured of controls:</p><dl>',
  ]
  for name, words in controls.items():
    lines.append(f'<dt>{page.text(name)}</dt><dd>{page.text(words)}</dd>')
  return '\n'.join([*lines, '</dl>'])


def _summary(records) -> str:
  """Figures of which an autoencoder is better or worse, with controls."""
  rows = []
  for record in records.values():
    for entry in record.get('figures', {}).values():
      if entry['better'] and entry['orders']:
        rows.append([record['title'], *_row(entry)])
  head = ['evaluation', 'figure', 'better', 'value', 'smallest difference']
  return page.table([*head, 'controls', 'told apart?'], rows)


def _row(entry: dict[str, Any]) -> list[str]:
  (_, own), *others = entry['of'].items()
  same = [
    name for name, of in others if _overlap(own, of) and of['value'] is not None
  ]
  there = [name for name, of in others if of['value'] is not None]
  verdict = 'yes' if there else ''
  if same:
    verdict = f'!not from {", ".join(same)}'
  return [
    entry['title'] + (f', {entry["unit"]}' if entry['unit'] else ''),
    {'low': 'lower', 'high': 'higher', '': ''}[entry['better']],
    _with_interval(own),
    _number(own['least_difference']),
    '; '.join(f'{name} {_number(others_of["value"])}'
              for name, others_of in others
              if others_of['value'] is not None),
    verdict,
  ]  # fmt: skip


def _overlap(own, other) -> bool:
  """Whether neither value lies outside of the other's interval."""
  ends = own['low'], own['high'], other['low'], other['high']
  if None in ends:
    return False
  return own['low'] <= other['high'] and other['low'] <= own['high']


def _evaluation(name: str, record: dict[str, Any]) -> list[str]:
  parts = [f'<h2>{page.text(record["title"])}</h2>']
  parts += [
    f'<p>{page.text(" ".join(paragraph.split()))}</p>'
    for paragraph in record['about'].split('\n\n')
  ]
  size = ', '.join(
    f'{key.replace("_", " ")} {value:,}'
    for key, value in record['size'].items()
  )
  parts.append(
    f'<p>Measured: {page.text(size)}; {record["draws"]} draws; intervals over '
    f'{page.text(record["unit"])}.</p>'
  )
  if 'cannot' in record:
    parts.append(
      f'<p class="open">Not measured: {page.text(record["cannot"])}.</p>'
    )
    return parts
  rows = []
  for entry in record['figures'].values():
    unit = f', {entry["unit"]}' if entry['unit'] else ''
    for place, (who, of) in enumerate(entry['of'].items()):
      if of['value'] is None and place:
        continue
      rows.append([
        f'{entry["title"]}{unit}' if place == 0 else '',
        who,
        _with_interval(of),
        _number(of['least_difference']),
        f'{of["units"]:,}',
      ])  # fmt: skip
  if rows:
    head = ['figure', 'of', 'value', 'smallest difference', record['unit']]
    parts.append(page.table(head, rows))
  for curve, figure in plots.of_evaluation(name, record).items():
    parts.append(page.picture(curve, figure))
  entries = [*record['figures'].values(), *record['curves'].values()]
  parts.append('<dl>')
  parts += [
    f'<dt>{page.text(entry["title"])}</dt>'
    f'<dd>{page.text(entry["definition"])}</dd>'
    for entry in entries
  ]
  parts.append('</dl>')
  parts += [f'<p>{page.text(remark)}</p>' for remark in record['remarks']]
  for title, (head, *body) in record['tables'].items():
    parts.append(f'<h3>{page.text(title)}</h3>')
    parts.append(page.table(head, [list(map(str, row)) for row in body]))
  return parts


def _with_interval(of: dict[str, Any]) -> str:
  if of['value'] is None:
    return 'none'
  if of['low'] is None:
    return _number(of['value'])
  return f'{_number(of["value"])} [{_number(of["low"])}, {_number(of["high"])}]'


def _number(value: float | None) -> str:
  return '' if value is None else f'{value:.4g}'
