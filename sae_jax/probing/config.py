"""What sae-probe is asked for."""

import dataclasses

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import subject as subject_lib
from sae_jax.probing import pooled
from sae_jax.probing.examples import FeatureConfig
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.probing.suite import evaluations, loss_curve

# Fields that say which text is streamed, and how.
_OF_STREAM = (
  'sources',
  'n_tokens',
  'holdout_fraction',
  'skip_bad_rows',
  'batch_contexts',
  'tokenizer_workers',
)


@dataclasses.dataclass(frozen=True)
class ProbeConfig(config_lib.Config):
  """Options of the evaluation of a checkpoint."""

  features: FeatureConfig = dataclasses.field(default_factory=FeatureConfig)
  subject: str = config_lib.option('', subject_lib.MOVED)
  stream: bool = config_lib.option(
    False,
    'compute activations as they are needed, in place of a store: as those '
    'that the run was trained on, from the same text or from --sources',
    may_change=True,
  )
  sources: tuple[str, ...] = config_lib.option(
    (),
    'sources of text for --stream, as of sae-harvest; empty for those of the '
    'store that the run was trained on',
    may_change=True,
  )
  n_tokens: int = config_lib.option(
    0,
    'number of activations for --stream, as of sae-harvest; 0 for as many as '
    'the store has that the run was trained on',
    least=0,
    may_change=True,
  )
  holdout_fraction: float = config_lib.option(
    0.0,
    'share of the rows of --stream that are held out, those of the last '
    'documents; 0 for that of the store that the run was trained on',
    least=0,
    may_change=True,
  )
  skip_bad_rows: bool = config_lib.option(
    False,
    'leave out rows of the sources of --stream that have no text, as '
    'sae-harvest does; without it, if the store was harvested so',
    may_change=True,
  )
  batch_contexts: int = config_lib.option(
    0,
    'number of contexts in a forward pass of --stream; 0 for as many as in '
    'the harvest that the run was trained on',
    least=0,
    may_change=True,
  )
  tokenizer_workers: int = config_lib.option(
    0,
    'number of processes that tokenize for --stream; 0 to tokenize in the '
    'probing process. It does not change the results',
    least=0,
    may_change=True,
  )
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
  probe_losses: bool = config_lib.option(
    False,
    "write the training loss of each latent's probe on each task to the "
    'feature table, as the column probe_train_ce',
  )
  seed: int = config_lib.option(
    0, 'seed of train/test splits, controls and examples', least=0
  )
  controls: tuple[str, ...] = config_lib.option(
    (),
    'workdirs of other runs on the same store, such as one with a frozen '
    'decoder, that are scored on the same rows in the same pass',
  )
  suite: tuple[str, ...] = config_lib.option(
    (),
    'evaluations beside the report: all, or their names, in hours; quick, or '
    'quick and names, on small samples in minutes. They are '
    + ', '.join(evaluations.NAMES),
    may_change=True,
  )
  loss_curve: str = config_lib.option(
    '',
    "CSV file with columns compute and loss, of models of the subject's family "
    'on the same kind of text: --suite=downstream then tells the loss on '
    'reconstructions as a share of training compute',
    may_change=True,
  )
  wordnet: str = config_lib.option(
    '',
    "folder of WordNet's index.noun and data.noun, as of the Debian package "
    'wordnet-base, for --suite=completeness',
    may_change=True,
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

  def __post_init__(self):
    super().__post_init__()
    evaluations.asked(self.suite)
    if self.loss_curve:
      loss_curve.read(self.loss_curve)
    if not self.stream:
      for field in dataclasses.fields(self):
        given = getattr(self, field.name)
        if field.name in _OF_STREAM and given != field.default:
          raise errors.UserError(
            f'{field.name} is for --stream: give --stream, or leave it out'
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
