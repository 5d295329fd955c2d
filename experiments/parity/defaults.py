"""transformers' defaults of each family, as JSON for the tests.

    pip install transformers
    python -m experiments.parity.defaults > tests/data/family_defaults.json

Keys that all families share are left out, and lists of layers, which depend on
their number.
"""

import json

from absl import app
import transformers

from sae_jax.subject.formats import families


def defaults(model_type: str) -> dict:
  """Key -> default of a family's config, None among them."""
  config = transformers.CONFIG_MAPPING[model_type]()
  shared = transformers.PretrainedConfig().to_dict()
  return {
    key: value
    for key, value in config.to_dict().items()
    if key not in shared and key != 'layer_types'
  }


def main(argv) -> None:
  del argv
  record = {name: defaults(name) for name in families.FAMILIES}
  record = {'transformers': transformers.__version__, 'families': record}
  print(json.dumps(record, indent=1, sort_keys=True))


if __name__ == '__main__':
  app.run(main)
