"""Probes a made autoencoder with more latents than this machine could train.

Prints a JSON line for each stage: seconds, and the peak of this process's
resident memory while it lasted. Then one that is the whole: the bytes of the
weights and the peak of all stages beyond them.

The checkpoint is saved as training saves it. --alive latents fire, each on
--rows x --k / --alive rows; the others have a bias that no input outweighs.

  python -m experiments.benchmarks.probe_scale --workdir=runs/scale
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sae_jax import autoencoder, checkpoint, store
from sae_jax import config as config_lib
from sae_jax import features as features_lib
from sae_jax import mesh as mesh_lib
from sae_jax.cli import flags
from sae_jax.probing import reconstruction, table
from sae_jax.probing.examples import FeatureConfig
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.probing.scan.run import scan
from sae_jax.store import manifest, writer

_CONTEXT = 128
_SITE = 'blocks.0.resid_post'
_WORDS = 1000
_SILENT = -2.0
# Latents whose rows are drawn at a time.
_ROWS = 2**16
_OPENED = 64


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """What is probed."""

  n: int = config_lib.option(131_072, 'number of latents, N', least=1)
  d: int = config_lib.option(768, 'width of the activations, D', least=1)
  k: int = config_lib.option(32, 'active latents of a token, K', least=1)
  alive: int = config_lib.option(1000, 'latents that fire', least=1)
  rows: int = config_lib.option(20_000, 'rows of the store', least=512)
  batch_rows: int = config_lib.option(4096, 'rows of a batch', least=1)
  neighbours: int = config_lib.option(
    0, 'nearest decoder rows of each latent: N x N x D products', least=0
  )
  control: bool = config_lib.option(
    False, 'score an untrained autoencoder too, which is as large'
  )


def directions(config: BenchmarkConfig) -> np.ndarray:
  """Random unit rows, [N, D], made in place."""
  w_ND = np.empty((config.n, config.d), np.float32)
  for start in range(0, config.n, _ROWS):
    part = w_ND[start : start + _ROWS]
    np.random.default_rng(start).standard_normal(out=part, dtype=np.float32)
    part /= np.linalg.norm(part, axis=1, keepdims=True)
  return w_ND


def alive(config: BenchmarkConfig) -> np.ndarray:
  """The latents that fire, in order."""
  return np.linspace(0, config.n - 1, min(config.alive, config.n)).astype(int)


def make(config: BenchmarkConfig, workdir: str) -> None:
  """Writes the checkpoint and the store, in a process of its own."""
  shutil.rmtree(workdir, ignore_errors=True)
  w_ND = directions(config)
  alive_F = alive(config)
  _write_store(config, w_ND[alive_F], f'{workdir}/store')
  bias_N = np.full(config.n, _SILENT, np.float32)
  bias_N[alive_F] = 0
  # The same array twice: the encoder is the transpose of the decoder.
  w_ND = jax.device_put(w_ND)
  sae_config = autoencoder.SaeConfig(
    d_model=config.d, n_latents=config.n, k=config.k, preprocessing='none'
  )
  sae = autoencoder.Sae(
    w_enc_ND=w_ND,
    w_dec_ND=w_ND,
    b_lat_N=jnp.asarray(bias_N),
    b_pre_D=jnp.zeros(config.d),
    data_mean_D=jnp.zeros(config.d),
    data_scale=jnp.ones(()),
  )
  one = jnp.array(1)
  contents = checkpoint.Contents(
    sae=sae,
    ema={'count': one, 'ema': {}},
    adam={'count': one, 'mu': {}, 'nu': {}},
    progress={
      'silent_N': jnp.zeros(config.n, jnp.int32),
      'mse_of_mean': jnp.array(1.0),
      'step': one,
      'skipped': one,
    },
  )
  metadata = checkpoint.Metadata(
    train_config={
      'sae': dataclasses.asdict(sae_config),
      'optimizer': {'ema_decay': 0.0},
      'sample_rows': 512,
    },
    mse_of_mean=1.0,
    dataset=store.open_store(f'{workdir}/store').about,
    metric_definitions={},
  )
  with checkpoint.open_checkpointer(f'{workdir}/train') as checkpointer:
    checkpoint.save(checkpointer, 1, contents, metadata).result()


def _write_store(config, w_FD, url) -> None:
  """Rows that are sums of K of some directions."""
  plan = manifest.StorePlan(
    subject='none',
    sites=(_SITE,),
    d_model=config.d,
    dtype='bfloat16',
    context_length=_CONTEXT,
  )
  rng = np.random.default_rng(0)
  n_rows = config.rows - config.rows % _CONTEXT

  def stretches():
    step = 128 * _CONTEXT
    for start in range(0, n_rows, step):
      size = min(step, n_rows - start)
      weight_BF = np.zeros((size, len(w_FD)), np.float32)
      for weight_F in weight_BF:
        of_row = rng.choice(len(w_FD), min(config.k, len(w_FD)), replace=False)
        weight_F[of_row] = rng.uniform(0.5, 1.5, len(of_row))
      places = np.arange(start, start + size)
      yield (
        rng.integers(0, _WORDS, size),
        places // _CONTEXT,
        places % _CONTEXT,
        np.ones(size, bool),
        {_SITE: (weight_BF @ w_FD).astype(ml_dtypes.bfloat16)},
      )

  writer.write(url, plan, stretches(), holdout_rows=8 * _CONTEXT)


def _peak() -> float:
  """Peak of this process's resident memory since it was forgotten, GiB."""
  status = pathlib.Path('/proc/self/status').read_text()
  return int(status.partition('VmHWM:')[2].split()[0]) / 2**20


@contextlib.contextmanager
def stage(stages: dict[str, Any], name: str) -> Iterator[None]:
  """Measures what is done inside."""
  pathlib.Path('/proc/self/clear_refs').write_text('5')
  start = time.perf_counter()
  yield
  seconds = time.perf_counter() - start
  stages[name] = {'seconds': round(seconds, 1), 'peak_gib': round(_peak(), 2)}
  print(json.dumps({name: stages[name]}), flush=True)


def probe(config: BenchmarkConfig, workdir: str) -> dict[str, Any]:
  """All stages but those that need a subject."""
  stages = {}
  with stage(stages, 'start'):
    mesh = mesh_lib.make_mesh(1, 1)
  with stage(stages, 'load'):
    trained = checkpoint.load(f'{workdir}/train', mesh=mesh)
    opened = store.open_store(f'{workdir}/store', in_order=True)
    weights = sum(a.nbytes for a in jax.tree.leaves(trained.sae))
  controls = {}
  if config.control:
    with stage(stages, 'control'):
      controls['untrained'] = reconstruction.untrained(
        trained.config, opened.finite_rows(0, 512), 1, mesh
      )
  scan_config = ScanConfig(batch_rows=config.batch_rows)
  with stage(stages, 'scan'):
    result = scan(
      scan_config, trained, opened, f'{workdir}/probe', mesh, controls
    )
  feature_config = FeatureConfig(votes=0, neighbours=config.neighbours)
  url = f'{workdir}/probe/features'
  with stage(stages, 'table'):
    table_writer = table.fill(
      feature_config,
      trained,
      None,
      opened,
      result,
      url,
      f'{workdir}/scratch',
      seed=0,
    )
  with stage(stages, 'seal'):
    table_writer.seal({'subject': 'none'})
  with stage(stages, 'open'):
    features = features_lib.open(url, _WORDS)
    for latent in alive(config)[:_OPENED]:
      first = latent - latent % 64
      block = features.latents(first, min(first + 64, config.n))
  fired_N = features.column('count')
  peak = max(of['peak_gib'] for of in stages.values())
  return {
    'config': dataclasses.asdict(config),
    'stages': stages,
    'columns': len(block),
    'fired': int((fired_N > 0).sum()),
    'median_count': float(np.median(fired_N[fired_N > 0])),
    'fvu': result.metrics.fvu,
    'weights_gib': round(weights / 2**30, 2),
    'peak_gib': peak,
    'beyond_weights_gib': round(peak - weights / 2**30, 2),
  }


def main() -> None:
  """Makes what is absent, measures and prints."""
  config, workdir = flags.read(BenchmarkConfig), flags.url('workdir')
  # Its memory is not this process's.
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    pool.apply(make, (config, workdir))
  print(json.dumps(probe(config, workdir)))


if __name__ == '__main__':
  flags.define(BenchmarkConfig)
  flags.define_url('workdir', 'scratch folder, which is emptied')
  flags.run(main, __doc__)
