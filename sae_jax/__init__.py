"""TopK sparse autoencoders for language-model activations, in JAX.

Array names end in the letters of their axes, as in an einsum:

  B  tokens in a batch            D  activation width (d_model)
  N  latents                      K  active latents of a token
  S  latents of one shard         T  sequence positions
  V  vocabulary                   R  rows of an activation store
  M  examples kept for a latent   W  tokens of an example's context
  P  prompts of a probe task      C  classes or tasks
  H  histogram bins                E  tokens of a device's share of B

so `w_dec_ND` is a decoder with one row per latent and `vals_BK` holds the K
activations of each token of a batch.

What `__all__` names is the public surface. It is imported when it is first
used, so that `import sae_jax` itself takes no time.
"""

import os
import pkgutil
import typing

if typing.TYPE_CHECKING:
  from sae_jax.autoencoder.params import SaeConfig
  from sae_jax.autoencoder.raw import Codes
  from sae_jax.browser.build import browse
  from sae_jax.browser.index import BrowseConfig
  from sae_jax.checkpoint.trained import load, Trained
  from sae_jax.config import Config, option
  from sae_jax.errors import UserError
  from sae_jax.explaining.config import ExplainConfig
  from sae_jax.explaining.printed import lines as explained_lines
  from sae_jax.explaining.run import explain_latents
  from sae_jax.features.reader import Features, open_features
  from sae_jax.harvesting.config import HarvestConfig
  from sae_jax.harvesting.harvest import harvest
  from sae_jax.interchange.convert import convert, ConvertConfig
  from sae_jax.interchange.convert import lines as conversion_lines
  from sae_jax.probing.examples import FeatureConfig
  from sae_jax.probing.explain import explain, read_latent
  from sae_jax.probing.printed import latent_lines
  from sae_jax.probing.printed import text_lines as explanation_lines
  from sae_jax.probing.report import probe, ProbeConfig
  from sae_jax.probing.steering import steer
  from sae_jax.probing.suite.compare import compare as compare_suites
  from sae_jax.probing.summary import lines as report_lines
  from sae_jax.scaling.config import FitConfig
  from sae_jax.scaling.fit import fit as fit_scaling
  from sae_jax.scaling.summary import lines as scaling_lines
  from sae_jax.store.reader import open_store, Store
  from sae_jax.subject import load as load_subject
  from sae_jax.sweeps.grid import grid as sweep_grid
  from sae_jax.sweeps.work import work as run_sweep
  from sae_jax.sweeps.work import WorkConfig
  from sae_jax.training.config import TrainConfig
  from sae_jax.training.objective import ObjectiveConfig
  from sae_jax.training.optimizer import OptimizerConfig
  from sae_jax.training.train import sweep, train, train_many

__all__ = [
  'BrowseConfig',
  'Codes',
  'Config',
  'ConvertConfig',
  'ExplainConfig',
  'FeatureConfig',
  'Features',
  'FitConfig',
  'HarvestConfig',
  'ObjectiveConfig',
  'OptimizerConfig',
  'ProbeConfig',
  'SaeConfig',
  'Store',
  'TrainConfig',
  'Trained',
  'UserError',
  'WorkConfig',
  'browse',
  'compare_suites',
  'conversion_lines',
  'convert',
  'explain',
  'explain_latents',
  'explained_lines',
  'explanation_lines',
  'fit_scaling',
  'harvest',
  'latent_lines',
  'load',
  'load_subject',
  'open_features',
  'open_store',
  'option',
  'probe',
  'read_latent',
  'report_lines',
  'run_sweep',
  'scaling_lines',
  'steer',
  'sweep',
  'sweep_grid',
  'train',
  'train_many',
]
_PLACES = {
  'BrowseConfig': 'browser.index:BrowseConfig',
  'Codes': 'autoencoder.raw:Codes',
  'Config': 'config:Config',
  'ConvertConfig': 'interchange.convert:ConvertConfig',
  'ExplainConfig': 'explaining.config:ExplainConfig',
  'FeatureConfig': 'probing.examples:FeatureConfig',
  'Features': 'features.reader:Features',
  'FitConfig': 'scaling.config:FitConfig',
  'HarvestConfig': 'harvesting.config:HarvestConfig',
  'ObjectiveConfig': 'training.objective:ObjectiveConfig',
  'OptimizerConfig': 'training.optimizer:OptimizerConfig',
  'ProbeConfig': 'probing.report:ProbeConfig',
  'SaeConfig': 'autoencoder.params:SaeConfig',
  'Store': 'store.reader:Store',
  'TrainConfig': 'training.config:TrainConfig',
  'Trained': 'checkpoint.trained:Trained',
  'UserError': 'errors:UserError',
  'WorkConfig': 'sweeps.work:WorkConfig',
  'browse': 'browser.build:browse',
  'compare_suites': 'probing.suite.compare:compare',
  'conversion_lines': 'interchange.convert:lines',
  'convert': 'interchange.convert:convert',
  'explain': 'probing.explain:explain',
  'explain_latents': 'explaining.run:explain_latents',
  'explained_lines': 'explaining.printed:lines',
  'explanation_lines': 'probing.printed:text_lines',
  'fit_scaling': 'scaling.fit:fit',
  'harvest': 'harvesting.harvest:harvest',
  'latent_lines': 'probing.printed:latent_lines',
  'load': 'checkpoint.trained:load',
  'load_subject': 'subject:load',
  'open_features': 'features.reader:open_features',
  'open_store': 'store.reader:open_store',
  'option': 'config:option',
  'probe': 'probing.report:probe',
  'read_latent': 'probing.explain:read_latent',
  'report_lines': 'probing.summary:lines',
  'run_sweep': 'sweeps.work:work',
  'scaling_lines': 'scaling.summary:lines',
  'steer': 'probing.steering:steer',
  'sweep': 'training.train:sweep',
  'sweep_grid': 'sweeps.grid:grid',
  'train': 'training.train:train',
  'train_many': 'training.train:train_many',
}

# TensorStore waits for ever for a server that is silent. With these a transfer
# that stays below a kilobyte a second for a minute is begun again.
os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', '60')
os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES', '1024')

__version__ = '0.1.0'


def __getattr__(name: str) -> typing.Any:
  if name not in _PLACES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = pkgutil.resolve_name(f'{__name__}.{_PLACES[name]}')
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
