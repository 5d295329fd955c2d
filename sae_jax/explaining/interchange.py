"""Explanations and scores in the files of delphi and of Neuronpedia."""

from collections.abc import Iterable, Mapping, Sequence
import datetime
import gzip
import hashlib
import json
import re
from typing import Any

from etils import epath
import numpy as np

from sae_jax import errors
from sae_jax.explaining import examples
from sae_jax.explaining.examples import Text
from sae_jax.storage import files, records

# delphi names a file by module and latent, such as layers.3.mlp_latent12.txt.
_DELPHI = re.compile(r'(?:.*_latent)?(\d+)\.txt')
_SCORE_TYPE = 'sae_jax_detection'
# The account that Neuronpedia's own database is begun with. Rows are its.
NEURONPEDIA_CREATOR = 'clkht01d40000jv08hvalcvly'


def read(path: str) -> dict[int, str]:
  """Explanations by others, by latent.

  Args:
    path: a folder of delphi, `explanations/` or the one that it is in, or a
      .jsonl or .jsonl.gz of Neuronpedia's rows of explanations; local or URL.

  Raises:
    UserError: if it holds none, or what cannot be read.
  """
  place = epath.Path(path)
  try:
    found = _delphi(place) if place.is_dir() else _neuronpedia(place)
  except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
    raise errors.UserError(
      f'explanations {path} cannot be read: {errors.reason(error)}'
    ) from None
  if not found:
    raise errors.UserError(
      f'{path} holds no explanations: give a folder with files such as '
      'NAME_latent12.txt, or a .jsonl with index and description'
    )
  return found


def _delphi(folder: epath.Path) -> dict[int, str]:
  inner = folder / 'explanations'
  folder = inner if inner.is_dir() else folder
  found = {}
  for path in sorted(folder.iterdir()):
    match = _DELPHI.fullmatch(path.name)
    if not match:
      continue
    text, latent = json.loads(path.read_bytes()), int(match[1])
    if not isinstance(text, str) or not text.strip():
      raise errors.UserError(f'{path} is no JSON string: leave it out')
    if latent in found:
      raise errors.UserError(
        f'{folder} has two explanations of latent {latent}: give those of one '
        'autoencoder'
      )
    found[latent] = ' '.join(text.split())
  return found


def _neuronpedia(path: epath.Path) -> dict[int, str]:
  data = path.read_bytes()
  if path.name.endswith('.gz'):
    data = gzip.decompress(data)
  found = {}
  for row in records.parse_lines(data)[0]:
    index, text = str(row.get('index', '')), row.get('description')
    # The first of several counts.
    if index.isdecimal() and isinstance(text, str) and text.strip():
      found.setdefault(int(index), ' '.join(text.split()))
  return found


def check_empty(folder: str) -> None:
  """Raises UserError for an export into a folder that holds something."""
  path = epath.Path(folder)
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise errors.UserError(
      f'{folder} holds something, with which an export would mix: give a new '
      'or an empty folder'
    )


def write_delphi(
  folder: str,
  site: str,
  explained: Mapping[int, str],
  judged: Mapping[int, tuple[Sequence[Text], np.ndarray]],
  vocabulary: Sequence[str | bytes],
) -> None:
  """Writes explanations/ and scores/detection/, a file for each latent.

  Args:
    folder: local path or URL.
    site: names the files.
    explained: explanations by latent.
    judged: texts of a latent and the mean probability of each [X]; nan where
      there is no answer, of which delphi has null.
    vocabulary: the text or bytes of each token.
  """
  names = {latent: f'{site}_latent{latent}.txt' for latent in explained}
  for latent, text in explained.items():
    path = epath.Path(folder) / 'explanations' / names[latent]
    files.write_text(path, json.dumps(text, allow_nan=False))
  for latent, (texts, p_X) in judged.items():
    path = epath.Path(folder) / 'scores' / 'detection' / names[latent]
    rows = [_delphi_row(*one, vocabulary) for one in zip(texts, p_X.tolist())]
    files.write_text(path, json.dumps(rows, allow_nan=False))


def _delphi_row(text: Text, p: float, vocabulary) -> dict[str, Any]:
  active, has = text.kind == examples.TENTH, not np.isnan(p)
  says = bool(p > 0.5) if has else None
  return {
    'str_tokens': spelled(vocabulary[token] for token in text.tokens),
    'activations': list(text.acts),
    # delphi's quantiles count from 1; -1 is a text without activations.
    'distance': text.tenth + 1 if active else -1,
    'activating': active,
    'prediction': says,
    'probability': p if has else None,
    'correct': says == active if has else None,
  }


def spelled(tokens: Iterable[str | bytes]) -> list[str]:
  """Tokens as texts; a sign stands for bytes that are no whole character."""
  return [
    token.decode(errors='replace') if isinstance(token, bytes) else token
    for token in tokens
  ]


def neuronpedia_source(site: str) -> str:
  """The id of a source of Neuronpedia, LAYER-SET, after a site."""
  if site in ('embed', 'pos_embed'):
    return f'e-{site}'
  return re.sub(r'^blocks\.(\d+)\.', r'\1-', site)


def neuronpedia_explanation(
  model_id: str, layer: str, line: Mapping[str, Any], created: str
) -> dict[str, Any]:
  """A row of an explanation, as Neuronpedia imports it.

  Args:
    model_id: see `write_neuronpedia`.
    layer: see there.
    line: a line of explanations.jsonl of `features.explanations` that has an
      explanation.
    created: the time of the row, in ISO 8601.
  """
  index, text = str(line['latent']), line['explanation']
  words = '\n'.join((model_id, layer, index, text))
  notes = f'by {line["model"]}, with sae_jax'
  if line['score'] is not None:
    accuracy = line['score']['balanced_accuracy'][0]
    notes += f'; balanced accuracy of detection {accuracy:.2f}'
  return {
    'id': hashlib.sha256(words.encode()).hexdigest()[:24],
    'modelId': model_id,
    'layer': layer,
    'index': index,
    'description': text,
    'authorId': NEURONPEDIA_CREATOR,
    # Those that their database does not know are refused.
    'typeName': None,
    'explanationModelName': None,
    'notes': notes,
    'createdAt': created,
  }


def write_neuronpedia(
  folder: str,
  model_id: str,
  layer: str,
  judge: str,
  lines: Iterable[Mapping[str, Any]],
) -> None:
  """Writes explanations.jsonl and scores.jsonl with rows as of Neuronpedia.

  Args:
    folder: local path or URL.
    model_id: the subject's name there.
    layer: the name of the source there.
    judge: name of the language model.
    lines: the lines of explanations.jsonl of `features.explanations`.
  """
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  explanations, scores = [], []
  for line in lines:
    if line['explanation'] is None:
      continue
    row = neuronpedia_explanation(model_id, layer, line, now)
    explanations.append(row)
    if line['score'] is not None:
      scores.append(
        {
          'value': line['score']['balanced_accuracy'][0],
          'explanationId': row['id'],
          'explanationScoreTypeName': _SCORE_TYPE,
          'explanationScoreModelName': judge,
          'jsonDetails': json.dumps(line['score'], allow_nan=False),
        }
      )
  for name, rows in (('explanations', explanations), ('scores', scores)):
    text = ''.join(json.dumps(row, allow_nan=False) + '\n' for row in rows)
    files.write_text(epath.Path(folder) / f'{name}.jsonl', text)
