"""The config of a training run."""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import mesh as mesh_lib
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
    'site whose activations to train on; may be left out if the store has only'
    ' one',
    may_change=True,
    shared=True,
  )
  from_checkpoint: str = config_lib.option(
    '',
    'workdir of a run, or of sae-convert, whose autoencoder training begins '
    'with, with fresh moments; its settings are taken over. Empty to begin '
    'anew. Also --from',
    later=True,
  )
  store_version: int = config_lib.option(
    0,
    'version of the store to train on, from before more was appended to it; 0 '
    'for the latest',
    least=0,
    may_change=True,
    shared=True,
  )
  stream: bool = config_lib.option(
    False,
    'train on activations that are harvested during training, with the '
    'settings of the store, from the text that follows that of the store; '
    'evaluations use the store',
    shared=True,
  )
  subject: str = config_lib.option(
    '',
    'language model for --stream, by name or path, if it is not where the '
    'store was harvested from; empty for there. Its digest must be the same',
    may_change=True,
    shared=True,
  )
  tokenizer_workers: int = config_lib.option(
    0,
    'number of processes that tokenize for --stream; 0 to tokenize in the '
    'training process. It does not change the batches',
    least=0,
    may_change=True,
  )
  batch_size: int = config_lib.option(
    2048,
    'number of tokens in a training step, over all devices',
    least=1,
    most=2**31 - 1,
    shared=True,
  )
  micro_batches: int = config_lib.option(
    1,
    'number of parts in which each device works on its tokens, one after '
    'another; more than 1 for batches whose codes do not fit its memory',
    least=1,
    may_change=True,
  )
  steps: int = config_lib.option(1000, 'number of training steps', least=1)
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
    'what to do if the loss or a gradient is not finite: stop the run, or skip'
    ' the step and count it',
    ('stop', 'skip'),
    may_change=True,
  )
  sample_rows: int = config_lib.option(
    32_768,
    'number of rows from the start of the store that set the initial decoder '
    "bias and NMSE's constant",
    least=2,
  )
  window_chunks: int = config_lib.option(
    64,
    'number of chunks of the store that are read at a time and whose rows are '
    'shuffled together',
    least=1,
    shared=True,
  )
  lanes: int = config_lib.option(
    0,
    'number of lanes of the order, which must divide batch_size: each process '
    'reads only the lanes that its devices need; 0 for as many as suit the '
    "store's size",
    least=0,
    shared=True,
  )
  log_every: int = config_lib.option(
    10,
    'number of steps between lines of metrics; all lines are rewritten at '
    'every checkpoint, so use a larger number for runs of more than 100 000 '
    'lines',
    least=1,
    may_change=True,
  )
  eval_every: int = config_lib.option(
    0,
    'number of steps between evaluations on validation rows; 0 to evaluate '
    'only at the end',
    least=0,
    may_change=True,
  )
  eval_rows: int = config_lib.option(
    65_536,
    'most validation rows in an evaluation',
    least=2,
    may_change=True,
  )
  checkpoint_every: int = config_lib.option(
    500,
    'number of steps between checkpoints; 0 to save only at the end',
    least=0,
    may_change=True,
  )
  checkpoint_keep: int = config_lib.option(
    2,
    'number of latest checkpoints that are kept',
    least=1,
    may_change=True,
  )
  mesh_data: int = config_lib.option(
    0,
    'number of shards of the batch over devices; 0 for all devices that '
    'mesh_latent leaves',
    least=0,
    may_change=True,
    shared=True,
  )
  mesh_latent: int = config_lib.option(
    1,
    'number of shards of the latents over devices',
    least=1,
    may_change=True,
    shared=True,
  )
  profile_start: int = config_lib.option(
    10,
    'first step of the profile, see profile_steps',
    least=1,
    may_change=True,
  )
  profile_steps: int = config_lib.option(
    0,
    'number of steps to profile into profile/ of the workdir, for XProf; 0 for'
    ' no profile',
    least=0,
    may_change=True,
  )

  def __post_init__(self):
    super().__post_init__()
    objective_lib.check(self.sae, self.objective)
    if self.stream and self.sae.target_site:
      raise errors.UserError(
        f'stream computes the activations of one site, and target_site is '
        f'{self.sae.target_site}: train on a store that holds both'
      )
    # Refuses a schedule that does not fit the run.
    optimizer_lib.schedule(self.optimizer, self.steps)


def check_mesh(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
  """Raises UserError unless a mesh divides the latents and the batch."""
  mesh_lib.check_divides('n_latents', config.sae.n_latents, mesh, 'latent')
  mesh_lib.check_divides(
    'batch_size', config.batch_size, mesh, 'data', config.micro_batches
  )
