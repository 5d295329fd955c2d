"""Times probes of all latents, beside scikit-learn on the same columns.

Prints one JSON line last:

  ours_per_s      columns fitted a second, `newton.fit` alone, all cores
  sklearn_per_s   the same by `LogisticRegression(C=1e6)`, one column at a time
  ratio           of the two
  most_above      how far a training loss of ours is above scikit-learn's, nats
  search_s        a block of latents in all: products, labels, shuffled labels
                  and random directions, on one task
  projected_h     1,048,576 latents on 100 tasks at that rate

The columns are pre-activations of random latents on prompts whose labels move
them, so that some latents tell the label well and most hardly. Repeats of the
two take turns, and the median of each counts.

  pip install scikit-learn
  python -m experiments.benchmarks.probes --prompts=800
"""

import dataclasses
import json
import statistics
import time

import jax
import numpy as np

from sae_jax import autoencoder, checkpoint, errors
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax.cli import flags
from sae_jax.probing import pooled, probes, search

_AIM = 1_048_576 * 100


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """The columns, and how often each is timed."""

  prompts: int = config_lib.option(
    800, 'number of training prompts of the task', least=4
  )
  d: int = config_lib.option(576, 'width of the activations, D', least=1)
  latents: int = config_lib.option(
    16_384, 'number of latents in the block that is measured', least=256
  )
  sklearn_columns: int = config_lib.option(
    200, 'number of columns that scikit-learn fits; 0 to leave it out', least=0
  )
  repeats: int = config_lib.option(5, 'times that each is measured', least=1)


def make_task(
  config: BenchmarkConfig, mesh: jax.sharding.Mesh
) -> tuple[checkpoint.Trained, search.Training]:
  """Random latents, and prompts that labels move along some of them."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape, np.float32)

  w_enc_ND = normal(config.latents, config.d) / config.d**0.5
  sae = autoencoder.Sae(
    w_enc_ND=w_enc_ND,
    w_dec_ND=w_enc_ND,
    b_lat_N=normal(config.latents) / 10,
    b_pre_D=np.zeros(config.d, np.float32),
    data_mean_D=np.zeros(config.d, np.float32),
    data_scale=np.ones((), np.float32),
  )
  sizes = autoencoder.SaeConfig(config.d, config.latents, 32)
  labels_P = rng.permutation(np.arange(config.prompts) % 2)
  x_PD = normal(config.prompts, config.d)
  x_PD += labels_P[:, None] * w_enc_ND[:8].sum(0)
  training = search.Training(x_PD, labels_P, rng.permutation(labels_P))
  return (
    pooled.on_mesh(checkpoint.Trained(sizes, sae, 1.0, 0), mesh),
    training,
  )


def fit_by_sklearn(pre_PN: np.ndarray, labels_P: np.ndarray) -> np.ndarray:
  """Training losses of each column, by scikit-learn."""
  try:
    from sklearn import linear_model
  except ImportError as error:
    raise errors.UserError(
      'scikit-learn is not installed: pip install scikit-learn, or '
      '--sklearn_columns=0'
    ) from error
  losses = []
  for x_P in pre_PN.T:
    model = linear_model.LogisticRegression(C=1e6).fit(x_P[:, None], labels_P)
    logit_P = model.decision_function(x_P[:, None])
    losses.append(np.mean(np.logaddexp(0, logit_P) - labels_P * logit_P))
  return np.array(losses)


def timed(work) -> tuple[float, object]:
  """Seconds that a call takes, and what it returns."""
  began = time.perf_counter()
  result = work()
  return time.perf_counter() - began, result


def measure(config: BenchmarkConfig) -> dict[str, float | None]:
  """All figures."""
  mesh = mesh_lib.make_mesh()
  trained, training = make_task(config, mesh)
  pre_PN = np.asarray(
    autoencoder.pre_activations(trained.config, trained.sae, training.x_PD)
  )
  few_PN = pre_PN[:, : config.sklearn_columns].astype(np.float64)
  work = {
    'ours': lambda: probes.fit_probes(pre_PN, training.labels_P),
    'search': lambda: jax.block_until_ready(
      search.search(trained, mesh, [training], all_losses=True)[0].train_ce_N
    ),
  }
  if config.sklearn_columns:
    work['sklearn'] = lambda: fit_by_sklearn(few_PN, training.labels_P)
  # The first of each compiles.
  last = {name: do() for name, do in work.items()}
  seconds = {name: [] for name in work}
  for _ in range(config.repeats):
    for name, do in work.items():
      taken, last[name] = timed(do)
      seconds[name].append(taken)
  middle = {name: statistics.median(times) for name, times in seconds.items()}
  figures = {
    'ours_per_s': config.latents / middle['ours'],
    'search_s': middle['search'],
    'projected_h': middle['search'] / config.latents * _AIM / 3600,
    'sklearn_per_s': None,
    'ratio': None,
    'most_above': None,
  }
  if config.sklearn_columns:
    figures['sklearn_per_s'] = config.sklearn_columns / middle['sklearn']
    figures['ratio'] = figures['ours_per_s'] / figures['sklearn_per_s']
    ours_N = last['ours'].train_ce_N[: config.sklearn_columns]
    figures['most_above'] = float((ours_N - last['sklearn']).max())
  return figures


def work() -> None:
  """Measures as the flags say."""
  config = flags.read(BenchmarkConfig)
  print(json.dumps(dataclasses.asdict(config) | measure(config)))


if __name__ == '__main__':
  flags.define(BenchmarkConfig)
  flags.run(work, __doc__)
