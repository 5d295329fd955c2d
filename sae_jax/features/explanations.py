"""Explanations of latents in a workdir of sae-probe, and their scores.

sae-explain writes `explained/explanations.jsonl`, a line for each latent, and
last `explained/explain_report.json`, which has the digest of it and the
fingerprint of the autoencoder. Without them a workdir has no explanations.
"""

from collections.abc import Iterable, Mapping
import json
from typing import Any

from absl import logging
from etils import epath

from sae_jax import config, errors
from sae_jax.storage import files, finished, records

STAGE = 'sae-explain'
FOLDER, LINES, REPORT = 'explained', 'explanations.jsonl', 'explain_report.json'
_DIGEST = 'explanations_sha256'


def folder(workdir: epath.PathLike) -> epath.Path:
  """Where explanations are in a workdir of sae-probe."""
  return epath.Path(workdir) / FOLDER


def write(
  workdir: epath.PathLike,
  lines: Iterable[Mapping[str, Any]],
  report: Mapping[str, Any],
) -> None:
  """Writes explanations, and last their report.

  Args:
    workdir: of sae-probe, local path or URL.
    lines: `latent`, `explanation`, `score` and more of each; values that JSON
      has.
    report: with `sae_fingerprint`; values that JSON has.
  """
  out = folder(workdir)
  data = ''.join(
    json.dumps(config.through_json(line), allow_nan=False) + '\n'
    for line in lines
  ).encode()
  (out / REPORT).unlink(missing_ok=True)
  files.write_bytes(out / LINES, data)
  digest = {_DIGEST: finished.sha256(data)}
  files.write_text(out / REPORT, config.to_json({**report, **digest}))


def read(
  workdir: epath.PathLike,
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
  """The report and the lines by latent.

  Raises:
    UserError: if they are not finished or damaged.
  """
  remedy = f'run {STAGE} again'
  path = folder(workdir) / REPORT
  if not path.exists():
    raise errors.UserError(
      f'{workdir} has no {FOLDER}/{REPORT}: {remedy}, or give the workdir of '
      'another sae-probe'
    )
  report = records.read(path, remedy)
  data = (folder(workdir) / LINES).read_bytes()
  lines, damaged = records.parse_lines(data)
  if report.get(_DIGEST) != finished.sha256(data) or damaged:
    raise errors.UserError(
      f'{folder(workdir) / LINES} is not as {STAGE} wrote it: {remedy}'
    )
  return report, {line['latent']: line for line in lines}


def of_results(
  workdir: epath.PathLike, probed: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
  """The explanations that fit finished results, by latent; {} if none do.

  Args:
    workdir: of sae-probe.
    probed: its report.
  """
  if not (folder(workdir) / REPORT).exists():
    return {}
  try:
    report, lines = read(workdir)
  except (errors.UserError, OSError) as error:
    logging.warning('explanations are left out: %s', errors.reason(error))
    return {}
  own = probed.get('made_from', {}).get('sae_fingerprint')
  if report.get('sae_fingerprint') != own:
    logging.warning(
      'explanations of %s are of another autoencoder: left out', workdir
    )
    return {}
  return lines
