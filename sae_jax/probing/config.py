"""What sae-probe is asked for."""

import dataclasses

from sae_jax import config as config_lib
from sae_jax import subject as subject_lib
from sae_jax.probing import pooled
from sae_jax.probing.examples import FeatureConfig
from sae_jax.probing.scan.config import ScanConfig


@dataclasses.dataclass(frozen=True)
class ProbeConfig(config_lib.Config):
  """Options of the evaluation of a checkpoint."""

  features: FeatureConfig = dataclasses.field(default_factory=FeatureConfig)
  subject: str = config_lib.option('', subject_lib.MOVED)
  average: bool = config_lib.option(
    True,
    "evaluate the moving average of the weights; otherwise the last step's "
    'weights',
  )
  eval_rows: int = config_lib.option(
    1_000_000,
    'most test rows on which NMSE, FVU, L0 and density are measured',
    least=1,
  )
  batch_rows: int = config_lib.option(
    4096, 'number of rows of activations that are encoded at a time', least=1
  )
  downstream_tokens: int = config_lib.option(
    4096,
    'number of tokens of test documents on which delta CE and KL are measured',
    least=1,
  )
  task_names: tuple[str, ...] = config_lib.option(
    (), 'names of probe tasks to use; empty for the first n_tasks'
  )
  n_tasks: int = config_lib.option(
    4,
    'number of probe tasks if task_names is empty; 0 for all without a known '
    'flaw, those with fewer prompts than task_prompts too if they have 100',
    least=0,
  )
  task_prompts: int = config_lib.option(
    200, 'number of prompts of each probe task, an even number', least=4
  )
  task_chars: int = config_lib.option(
    100,
    "most characters of a probe task's prompt; longer prompts are not used",
    least=1,
  )
  task_tokens: int = config_lib.option(
    64, "most tokens that the subject reads of a probe task's prompt", least=1
  )
  pooling: str = config_lib.option(
    'mean',
    "how a prompt's activations become one vector: their mean, or the last "
    "token's",
    pooled.POOLING,
  )
  seed: int = config_lib.option(
    0, 'seed of train/test splits, controls and examples', least=0
  )
  controls: tuple[str, ...] = config_lib.option(
    (),
    'workdirs of other runs on the same store, such as one with a frozen '
    'decoder, that are scored on the same rows in the same pass',
  )
  save_every_rows: int = config_lib.option(
    5_000_000,
    'number of rows after which the pass over the store is saved, for the same '
    'command to go on from',
    least=1,
    may_change=True,
  )
  mesh_data: int = config_lib.option(
    0,
    'number of shards of the rows over devices; 0 for all devices that '
    'mesh_latent leaves',
    least=0,
    may_change=True,
  )
  mesh_latent: int = config_lib.option(
    1,
    'number of shards of the latents over devices',
    least=1,
    may_change=True,
  )


def scan_config(config: ProbeConfig) -> ScanConfig:
  """What the scan is asked for."""
  features = config.features
  return ScanConfig(
    feature_rows=features.feature_rows,
    eval_rows=config.eval_rows,
    batch_rows=config.batch_rows,
    top_examples=features.top_examples,
    random_examples=features.random_examples,
    near_examples=features.near_examples,
    seed=config.seed,
    save_every_rows=config.save_every_rows,
  )
