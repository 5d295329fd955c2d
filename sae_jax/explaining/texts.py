"""The texts of latents, drawn of a store's test rows once and then kept."""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

import numpy as np

from sae_jax import config as config_lib
from sae_jax.explaining import activations, examples
from sae_jax.explaining import windows as windows_lib
from sae_jax.explaining.config import ExplainConfig, Protocol
from sae_jax.explaining.examples import Drawn
from sae_jax.features import explanations
from sae_jax.probing import data as data_lib
from sae_jax.storage import files, records

_NAME = 'texts.jsonl'
# Raised with every change after which the same inputs give other texts.
_VERSION = 1


def of_latents(
  config: ExplainConfig,
  protocol: Protocol,
  checkpoint: str,
  store_url: str,
  workdir: str,
  probed: Mapping[str, Any],
  latents: np.ndarray,
) -> dict[int, Drawn]:
  """The texts of latents by latent, drawn if they are not there.

  Args:
    config: options.
    protocol: how many texts.
    checkpoint: see `run.explain_latents`, as the others.
    store_url: see there.
    workdir: see there.
    probed: its report.
    latents: their numbers, ascending.

  Raises:
    UserError: if the results are not of this checkpoint and store.
  """
  made_from = probed['made_from']
  head = config_lib.through_json(
    {
      'version': _VERSION,
      'sae_fingerprint': made_from['sae_fingerprint'],
      'store': made_from.get('store'),
      'protocol': dataclasses.asdict(protocol),
      'texts': [config.rows, config.window, config.least_examples],
      'seed': config.seed,
      'latents': latents.tolist(),
    }
  )
  path = explanations.folder(workdir) / _NAME
  if path.exists():
    lines, damaged = records.parse_lines(path.read_bytes())
    if not damaged and lines[:1] == [head] and len(lines) == len(latents) + 1:
      drawn = examples.from_lines(lines[1:], str(path))
      return {one.latent: one for one in drawn}
  drawn = _drawn(
    config, protocol, checkpoint, store_url, workdir, probed, latents
  )
  lines = [head, *examples.to_lines(drawn)]
  text = ''.join(json.dumps(line, allow_nan=False) + '\n' for line in lines)
  files.write_text(path, text)
  return {one.latent: one for one in drawn}


def _drawn(
  config, protocol, checkpoint, store_url, workdir, probed, latents
) -> list[Drawn]:
  trained, store = data_lib.of_results(checkpoint, store_url, probed, workdir)
  windows = windows_lib.cut(store, config.rows, config.window)
  peaks = activations.peaks(
    trained,
    store,
    windows,
    latents,
    config.batch_rows,
    protocol.baseline_tokens,
  )
  places = [
    examples.places(
      protocol,
      config.least_examples,
      windows,
      latent,
      peaks.peak_WU[:, u],
      peaks.near_WU[:, u],
      peaks.frequent[u],
      config.seed,
    )
    for u, latent in enumerate(latents.tolist())
  ]
  wanted = [(w, u) for u, place in enumerate(places) for w in place.all()]
  acts = activations.of_windows(
    trained, store, windows, latents, wanted, config.batch_rows
  )
  return [
    examples.filled(place, windows, {w: acts[w, u] for w in place.all()})
    for u, place in enumerate(places)
  ]
