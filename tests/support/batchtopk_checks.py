"""Runs of BatchTopK, and what it takes of a batch by sorting."""

import dataclasses

import numpy as np

from tests.support import runs, step_runs


def config():
  """A run in which AuxK and clipping take part."""
  made = step_runs.config()
  return dataclasses.replace(
    made, sae=dataclasses.replace(made.sae, activation='batchtopk')
  )


def values(kind):
  """Pre-activations, and how many of them are wanted."""
  rng = np.random.default_rng(4)
  pre_BN = rng.standard_normal((24, 40)).astype(np.float32)
  if kind == 'ties':
    pre_BN = np.round(pre_BN, 1)
  elif kind == 'few are positive':
    pre_BN = np.where(rng.random(pre_BN.shape) < 0.05, pre_BN, -1)
  elif kind == 'no numbers':
    pre_BN[3, 5:9], pre_BN[7, 7] = np.nan, np.inf
  elif kind == 'none is positive':
    pre_BN = -np.abs(pre_BN)
  elif kind == 'tiny':
    pre_BN *= np.float32(1e-30)
  return pre_BN.astype(np.float32), 24 * 4


def by_sorting(pre_BN, n_active):
  positive = np.sort(pre_BN[pre_BN > 0])[::-1]
  return positive[:n_active][-1] if len(positive) else np.inf


KINDS = (
  'plain', 'ties', 'few are positive', 'no numbers', 'none is positive', 'tiny',
)  # fmt: skip


def run_config(**kwargs):
  made = runs.train_config(**kwargs)
  return dataclasses.replace(
    made, sae=dataclasses.replace(made.sae, activation='batchtopk')
  )
