"""Neuronpedia's import bundle: a folder of rows in JSON lines."""

from collections.abc import Iterable, Mapping
import dataclasses
import datetime
import gzip
import json
from typing import Any, BinaryIO

from etils import epath

import sae_jax
from sae_jax import config as config_lib
from sae_jax import errors, progress
from sae_jax import subject as subject_lib
from sae_jax.dashboards import neuronpedia
from sae_jax.dashboards.config import DashboardConfig
from sae_jax.explaining import interchange
from sae_jax.features import explanations, Features, results
from sae_jax.storage import files, signed, workdir
from sae_jax.subject.formats import tokenizer as tokenizer_lib

# Written last: the import reads nothing without it.
_LAST = 'model.jsonl'
_PARTS = ('activations', 'explanations', 'features')
# The import lists so many files of a folder, and no more.
_MOST_FILES = 1000
_BATCH = 1024
# Latents whose windows are in memory.
_BLOCK = 256
_LEVEL = 5  # of gzip


@dataclasses.dataclass(frozen=True)
class Bundle:
  """What was written.

  Attributes:
    folder: where it is.
    latents: of how many latents it is.
    explanations: how many of them are explained.
  """

  folder: str
  latents: int
  explanations: int


def batch_latents(n_latents: int) -> int:
  """Latents of a file, so that the import lists all files."""
  size = _BATCH
  while -(-n_latents // size) > _MOST_FILES:
    size *= 2
  return size


def write(
  config: DashboardConfig, probe_url: str, out: str, subject: str = ''
) -> Bundle:
  """Writes finished results as Neuronpedia imports them.

  `OUT/MODEL/SOURCE/` gets features/, activations/ and explanations/, a file for
  each batch of latents, and rows of release, source set, source and, last,
  model. What a killed command has written is kept by the same one.

  Args:
    config: options.
    probe_url: the workdir of sae-probe; local path or URL, as all.
    out: the folder of all bundles.
    subject: where the subject is now; '' for where it was.

  Raises:
    UserError: if the results are not finished, an id is not of Neuronpedia's
      form, or there is a bundle already, or one of other results is begun.
  """
  report = results.read_report(probe_url)
  features = results.open_features(probe_url, report)
  explained = {
    latent: line
    for latent, line in explanations.of_results(probe_url, report).items()
    if line['explanation'] is not None
  }
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')
  source = neuronpedia.Source(
    config.neuronpedia_model or epath.Path(report['subject']).name,
    config.neuronpedia_source or interchange.neuronpedia_source(report['site']),
    now,
  )
  folder = str(epath.Path(out) / source.model / source.id)
  made_from = config_lib.through_json(
    {
      'probe': report['made_from'],
      'explanations': signed.digest(
        {str(n): of for n, of in explained.items()}
      ),
      'sae_jax': sae_jax.__version__,
    }
  )
  with workdir.hold(folder, results.STAGE, made_from):
    if (epath.Path(folder) / _LAST).exists():
      raise errors.UserError(
        f'{folder} is a whole bundle already: write to another folder, or '
        'delete it'
      )
    tokenizer = subject_lib.load_recorded_tokenizer(
      report['subject'], report.get('weights_sha256', ''), subject
    )
    words = interchange.spelled(tokenizer_lib.token_texts(tokenizer))
    workdir.sign(folder, results.STAGE, made_from)
    for part in ('', *_PARTS):
      files.remove_partial(epath.Path(folder) / part)
    size = batch_latents(features.n_latents)
    firsts = range(0, features.n_latents, size)
    for number, first in enumerate(progress.bar(firsts, desc='Neuronpedia')):
      own = range(first, min(first + size, features.n_latents))
      _write_batch(features, source, words, explained, folder, number, own)
    for name, row in _about(config, source, report).items():
      files.write_text(epath.Path(folder) / name, _line(row))
  return Bundle(folder, features.n_latents, len(explained))


def _write_batch(
  features: Features,
  source: neuronpedia.Source,
  words: list[str],
  explained: Mapping[int, Mapping[str, Any]],
  folder: str,
  number: int,
  latents: range,
) -> None:
  """Writes the files of a batch, those of the latents themselves last."""
  name = f'batch-{number}.jsonl.gz'
  paths = {part: epath.Path(folder) / part / name for part in _PARTS}
  if paths['features'].exists():
    return
  edges, rows = features.column('hist_edges'), []
  names = neuronpedia.columns(neuronpedia.kinds(list(features.columns)))

  def activations():
    for first in latents[::_BLOCK]:
      stop = min(first + _BLOCK, latents.stop)
      block = features.latents(first, stop, names)
      for row, own in neuronpedia.latents(block, edges, source, words):
        rows.append(_line(row))
        yield from map(_line, own)

  _write_rows(paths['activations'], activations())
  lines = (
    interchange.neuronpedia_explanation(
      source.model, source.id, explained[latent], source.created
    )
    for latent in latents
    if latent in explained
  )
  _write_rows(paths['explanations'], map(_line, lines))
  _write_rows(paths['features'], rows)


def _write_rows(path: epath.Path, lines: Iterable[str]) -> None:
  """Writes lines to a file, packed, if there are any."""
  # A file without lines is an error to the import.
  lines = iter(lines)
  first = next(lines, None)
  if first is None:
    return

  def write_all(file: BinaryIO) -> None:
    with gzip.GzipFile('', 'wb', _LEVEL, file, mtime=0) as packed:
      packed.write(first.encode())
      for line in lines:
        packed.write(line.encode())

  files.write_stream(path, write_all)


def _about(
  config: DashboardConfig, source: neuronpedia.Source, report: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """The rows of what the latents are of, by file, the last one last."""
  common = {
    'creatorId': interchange.NEURONPEDIA_CREATOR,
    'visibility': 'PUBLIC',
    'createdAt': source.created,
  }
  what = f'{report["n_latents"]:,} latents of {report["site"]}'
  if report.get('target_site'):
    what += f', which write {report["target_site"]}'
  name = source.model
  return {
    'release.jsonl': common
    | {
      'name': source.set,
      'description': source.set,
      'descriptionShort': source.set,
      'creatorName': config.neuronpedia_creator,
      'urls': [],
    },
    'sourceset.jsonl': common
    | {
      'modelId': name,
      'name': source.set,
      'description': what,
      'creatorName': config.neuronpedia_creator,
      'releaseName': source.set,
      'hasDashboards': True,
      'urls': [],
    },
    'source.jsonl': common
    | {
      'id': source.id,
      'modelId': name,
      'setName': source.set,
      'hasDashboards': True,
      'notes': f'{what}, on {report["n_tokens"]:,} tokens, by sae_jax '
      f'{sae_jax.__version__}',
    },
    # A model that is there already is left as it is.
    _LAST: common
    | {
      'id': name,
      'displayName': name,
      'displayNameShort': name,
      'instruct': False,
      'inferenceEnabled': False,
      'layers': 0,
      'neuronsPerLayer': 0,
      'owner': '',
      'updatedAt': source.created,
    },
  }


def _line(row: Mapping[str, Any]) -> str:
  return json.dumps(row, allow_nan=False, separators=(',', ':')) + '\n'
