"""Explanations and latents as lines for a terminal."""

from collections.abc import Iterator
import shutil

import numpy as np

from sae_jax.probing import spelling
from sae_jax.probing.explain import Explanation, Latent

_NARROWEST = 40
_PEAK = '⟦', '⟧'


def width() -> int:
  """The columns of the terminal; 80 where there is none."""
  return max(_NARROWEST, shutil.get_terminal_size().columns)


def text_lines(explanation: Explanation, columns: int) -> Iterator[str]:
  """The active latents of each token of a text, in lines of so many columns."""
  if explanation.labels:
    yield from _wrapped(
      '',
      [
        'Below each token: latent,',
        'activation,',
        'tokens of its highest activations',
        '| tokens that it votes for',
      ],
      columns,
    )
  rows = zip(
    explanation.tokens,
    explanation.latents_TK,
    explanation.values_TK,
    explanation.active_T,
  )
  for place, (token, latents_K, values_K, n_active) in enumerate(rows):
    shown = spelling.alone(token)
    if explanation.unseen and not place:
      shown += '  (at position 0, which the store leaves out)'
    yield spelling.cut(shown, columns)
    kept = latents_K >= 0
    pairs = list(zip(latents_K[kept].tolist(), values_K[kept].tolist()))
    left = n_active - len(pairs)
    rest = [f'and {left} more'] if left else []
    if explanation.labels:
      for latent, value in pairs:
        yield spelling.cut(_labelled(explanation, latent, value), columns)
      yield from _wrapped('  ', rest, columns)
    else:
      items = [f'{latent} {value:.4g}' for latent, value in pairs]
      yield from _wrapped('  ', _with_commas(items + rest), columns)
    if not n_active:
      yield '  none'


def _labelled(explanation: Explanation, latent: int, value: float) -> str:
  label = explanation.labels[latent]
  tokens, votes = (
    ' '.join(map(spelling.alone, tokens))
    for tokens in (label.tokens, label.votes)
  )
  votes = f' | {votes}' if votes else ''
  return f'{latent:>8} {value:>8.4g}  {tokens}{votes}'


def latent_lines(latent: Latent, columns: int) -> Iterator[str]:
  """A latent in lines of so many columns."""
  report, entries = latent.report, latent.columns
  number, count = int(entries['latent_ids']), int(entries['count'])
  yield from _wrapped(
    '',
    [
      f'latent {number:,} of {report["n_latents"]:,},',
      f'{report.get("site", "site unknown")}',
      f'of {report["subject"]}',
    ],
    columns,
  )
  yield from _explained(latent.explained, columns)
  n_tokens = report.get('n_tokens')
  of_all = f' of {n_tokens:,}' if n_tokens is not None else ''
  share = f'({_number(100 * entries["density"])} %)'
  yield from _wrapped(
    '', [f'fires on {count:,}{of_all} tokens', share], columns
  )
  if count:
    moments = ('max', 'mean', 'std', 'skew')
    items = [f'{name} {_number(entries[name])}' for name in moments]
    yield from _wrapped('activation: ', _with_commas(items), columns)
  if count and 'rank_mean' in entries:
    items = [
      f'rank {_number(entries["rank_mean"])} (0 is the strongest)',
      f'{_number(entries["margin_mean"])} above the weakest',
    ]
    title = 'on average among the active latents of a token: '
    yield from _wrapped(title, _with_commas(items), columns)
  for way in ('up', 'down'):
    ids = entries[f'vote_{way}_ids']
    if not ids.size:
      continue
    logits = entries[f'vote_{way}_logits'][ids >= 0]
    items = [
      f'{spelling.alone(latent.vocabulary[token])} {logit:+.3g}'
      for token, logit in zip(ids[ids >= 0].tolist(), logits.tolist())
    ]
    yield from _wrapped(
      f'votes {way}: ', _with_commas(items or ['none']), columns
    )
  yield from _effects(latent, columns)
  yield from _tokens(latent, columns)
  for title, name, score in (
    ('nearest', 'neighbour', 'cosines'),
    ('fires with', 'partner', 'scores'),
  ):
    if entries.get(f'{name}_ids', np.zeros(0)).size:
      ids, scores = (entries[f'{name}_{part}'] for part in ('ids', score))
      pairs = zip(ids[ids >= 0].tolist(), scores[ids >= 0].tolist())
      items = [f'{other} ({score:.3f})' for other, score in pairs] or ['none']
      yield from _wrapped(f'{title}: ', _with_commas(items), columns)
  yield from _examples(latent, columns)


def _explained(line, columns: int) -> Iterator[str]:
  """What sae-explain says of it, and how far that holds."""
  if line is None or line['explanation'] is None:
    return
  words = spelling.visible([line['explanation']]).split()
  yield from _wrapped('explanation: ', words, columns)
  if line['score'] is None:
    yield '  not scored'
    return
  value, low, high = line['score']['balanced_accuracy']
  items = [f'balanced accuracy {value:.2f} ({low:.2f} to {high:.2f})']
  other = line['controls']['other']
  if other is not None:
    items.append(
      f"{other['balanced_accuracy'][0]:.2f} by another latent's explanation"
    )
  yield from _wrapped('  ', _with_commas(items), columns)


def _effects(latent: Latent, columns: int) -> Iterator[str]:
  """What the subject says without it, of results that have measured it."""
  entries = latent.columns
  if not np.isfinite(entries.get('effect_kl', np.nan)):
    return
  items = [
    f'KL {_number(entries["effect_kl"])}',
    f'loss {entries["effect_ce"]:+.3g} nats',
  ]
  yield from _wrapped('without it, next tokens: ', _with_commas(items), columns)
  for way, title in (('up', 'likelier'), ('down', 'less likely')):
    ids = entries[f'effect_{way}_ids']
    changes = entries[f'effect_{way}_changes'][ids >= 0]
    items = [
      f'{spelling.alone(latent.vocabulary[token])} {100 * change:+.3g} %'
      for token, change in zip(ids[ids >= 0].tolist(), changes.tolist())
    ]
    yield from _wrapped(f'makes {title}: ', _with_commas(items), columns)


def _tokens(latent: Latent, columns: int) -> Iterator[str]:
  """On which tokens it fires, of results that count them."""
  entries = latent.columns
  if 'token_ids' not in entries:
    return
  rows = np.flatnonzero(entries['token_ids'] >= 0)
  items = [
    f'{spelling.alone(latent.vocabulary[entries["token_ids"][row]])} '
    f'{entries["token_counts"][row]:,} '
    f'({_number(100 * entries["token_shares"][row])} % of it)'
    for row in rows
  ]
  yield from _wrapped('tokens: ', _with_commas(items or ['none']), columns)


def _examples(latent: Latent, columns: int) -> Iterator[str]:
  entries = latent.columns
  rows = np.flatnonzero(entries['top_peak'] >= 0)
  if not len(rows):
    return
  yield 'highest activations, one of a document:'
  for row in rows:
    ids, peak = entries['top_tokens'][row], int(entries['top_peak'][row])
    value = f'{entries["top_acts"][row, peak]:>9.4g}  '
    before, at, after = (
      [latent.vocabulary[token] for token in part[part >= 0].tolist()]
      for part in (ids[:peak], ids[peak : peak + 1], ids[peak + 1 :])
    )
    yield value + _example(before, at, after, columns - len(value))


def _example(before, at, after, columns: int) -> str:
  """A window of tokens in so many columns, with its peak between marks."""
  before, at, after = map(spelling.visible, (before, at, after))
  at = _PEAK[0] + spelling.cut(at or '∅', columns // 2) + _PEAK[1]
  left = columns - spelling.columns(at)
  # The text before tells more; what one side does not need the other has.
  room = max(left * 2 // 3, left - spelling.columns(after))
  before = spelling.cut_left(before, room)
  return before + at + spelling.cut(after, left - spelling.columns(before))


def _number(value: float) -> str:
  return f'{value:.3g}' if np.isfinite(value) else 'none'


def _with_commas(items: list[str]) -> list[str]:
  return [f'{item},' for item in items[:-1]] + items[-1:]


def _wrapped(title: str, items: list[str], columns: int) -> Iterator[str]:
  """Items after a title, in lines of which the later ones are indented."""
  line, indent = title, '  ' if title else ''
  for item in items:
    added = f' {item}' if line.strip() and not line.endswith(' ') else item
    if line.strip() and spelling.columns(line + added) > columns:
      yield spelling.cut(line.rstrip(), columns)
      line, added = indent, item
    line += added
  if line.strip():
    yield spelling.cut(line.rstrip(), columns)
