"""The config of a training run."""

import dataclasses

from sae_jax import config as config_lib
from sae_jax.autoencoder import SaeConfig
from sae_jax.training import objective as objective_lib
from sae_jax.training import optimizer as optimizer_lib
from sae_jax.training.objective import ObjectiveConfig
from sae_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig(config_lib.Config):
  """One training run."""

  sae: SaeConfig = dataclasses.field(default_factory=SaeConfig)
  objective: ObjectiveConfig = dataclasses.field(
    default_factory=ObjectiveConfig
  )
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  site: str = config_lib.option(
    '',
    'site of the store to train on; optional if the store has only one',
    may_change=True,
    shared=True,
  )
  store_version: int = config_lib.option(
    0,
    'version of the store to train on, before more was appended; 0 for the '
    'latest',
    least=0,
    may_change=True,
    shared=True,
  )
  stream: bool = config_lib.option(
    False,
    'make activations as they are used, from the text after that of the '
    'store, which says how and is what the run is scored on',
    shared=True,
  )
  tokenizer_workers: int = config_lib.option(
    0,
    'processes that tokenize for a stream, 0 for this one; the batches do not '
    'depend on it',
    least=0,
    may_change=True,
  )
  batch_size: int = config_lib.option(
    2048, 'tokens per step', least=1, shared=True
  )
  micro_batches: int = config_lib.option(
    1,
    "parts of a device's tokens that are worked on one after another, for "
    'batches whose codes do not fit its memory',
    least=1,
    may_change=True,
  )
  steps: int = config_lib.option(1000, 'steps of the run', least=1)
  seed: int = config_lib.option(
    0, 'seed of the initial weights', least=0, most=2**31 - 1
  )
  order_seed: int = config_lib.option(
    0,
    'seed of the order of the batches',
    least=0,
    most=2**31 - 1,
    shared=True,
  )
  on_nonfinite: str = config_lib.option(
    'stop',
    'when a loss or gradient is not finite: stop the run, or skip the step '
    'and count it',
    ('stop', 'skip'),
    may_change=True,
  )
  sample_rows: int = config_lib.option(
    32_768,
    "rows that the median and NMSE's constant are taken from",
    least=2,
  )
  window_chunks: int = config_lib.option(
    64,
    'chunks of the store whose rows are mixed',
    least=1,
    shared=True,
  )
  lanes: int = config_lib.option(
    0,
    'parts of the order, of which a process reads those of its devices; they '
    'divide batch_size; 0 for as many as the store is worth',
    least=0,
    shared=True,
  )
  log_every: int = config_lib.option(
    10,
    'steps between lines of metrics, all of which are written at every '
    'checkpoint: for 100 000 lines and more take a larger number',
    least=1,
    may_change=True,
  )
  eval_every: int = config_lib.option(
    0,
    'steps between evaluations on held-out rows; 0 for the end only',
    least=0,
    may_change=True,
  )
  eval_rows: int = config_lib.option(
    65_536,
    'held-out rows of an evaluation, at most',
    least=2,
    may_change=True,
  )
  checkpoint_every: int = config_lib.option(
    500,
    'steps between checkpoints; 0 for the end only',
    least=0,
    may_change=True,
  )
  checkpoint_keep: int = config_lib.option(
    2,
    'checkpoints that are kept',
    least=1,
    may_change=True,
  )
  mesh_data: int = config_lib.option(
    0,
    'shards of the batch; 0 for the rest',
    least=0,
    may_change=True,
    shared=True,
  )
  mesh_latent: int = config_lib.option(
    1, 'shards of the latents', least=1, may_change=True, shared=True
  )
  profile_start: int = config_lib.option(
    10,
    'first step of the profile',
    least=1,
    may_change=True,
  )
  profile_steps: int = config_lib.option(
    0,
    'steps that are profiled into profile/ (XProf); 0 for none',
    least=0,
    may_change=True,
  )

  def __post_init__(self):
    super().__post_init__()
    objective_lib.check(self.sae, self.objective)
    # Refuses a schedule that does not fit the run.
    optimizer_lib.schedule(self.optimizer, self.steps)
