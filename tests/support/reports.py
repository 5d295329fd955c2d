"""A small evaluation of `probed`, with tasks of its own words."""

import dataclasses

import numpy as np

from sae_jax.probing import pooled, report, tasks
from sae_jax.probing.examples import FeatureConfig
from tests.support import probed

CONFIG = report.ProbeConfig(
  features=FeatureConfig(1000, 4, 2, 4, 2, 5, 3),
  eval_rows=40,
  batch_rows=16,
  downstream_tokens=30,
  n_tasks=2,
  # So many that every direction is one of the prompts' principal ones: probes
  # on channels and on these are one program.
  task_prompts=56,
)
# Rows of every kind are whole batches, which one program serves.
WHOLE_BATCHES = dataclasses.replace(CONFIG, batch_rows=10)


def made_tasks(names, n_tasks, n_prompts, max_chars, seed):
  """Prompts with w1 or w2 somewhere; stands in for the package's files."""
  assert (names, n_tasks, n_prompts, max_chars) == (None, 2, 56, 100)
  rng = np.random.default_rng(seed)
  labels_P = np.arange(n_prompts, dtype=np.int32) % 2
  out = []
  for name in ('1_which', '2_again')[:n_tasks]:
    prompts = []
    for label in labels_P:
      words = rng.integers(3, probed.VOCABULARY, rng.integers(3, 9))
      words[rng.integers(1, len(words))] = 1 + label
      prompts.append(' '.join(f'w{i}' for i in words))
    out.append(tasks.Task(name, tuple(prompts), labels_P, ('one', 'two')))
  return out


def probe(run, store_url, workdir, config=CONFIG, subject=None):
  subject = subject or probed.make_subject()
  return report.probe(config, run, store_url, str(workdir), subject)


def pooled_prompts(trained, mesh, task):
  """A task's prompts as a report of CONFIG pools them."""
  return pooled.pool(
    pooled.on_mesh(trained, mesh),
    mesh,
    probed.make_subject(),
    str(probed.SITE),
    list(task.prompts),
    64,
    'mean',
    '',
  )
