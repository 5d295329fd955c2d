"""sae-convert: autoencoders of other libraries to checkpoints, and back.

Formats are told by content. Files are read as data: no code in them is run.
"""

from absl import flags as absl_flags

from sae_jax.cli import flags
from sae_jax.interchange import convert


def define() -> None:
  """Defines this binary's flags."""
  flags.define(convert.ConvertConfig)
  flags.define_url(
    'from',
    'file or folder of an autoencoder, or workdir of sae-train, local path or '
    'URL; hf:ORGANISATION/NAME/FOLDER downloads it first',
  )
  flags.define_url('out', 'file or folder that is written')
  flags.define_url(
    'store',
    'store of activations of its site, for --to=checkpoint: the checkpoint '
    'says what it is of',
    required=False,
  )


def work() -> None:
  """Converts as the flags say."""
  source = absl_flags.FLAGS['from'].value
  conversion = convert.convert(
    flags.read(convert.ConvertConfig),
    source if convert.is_on_hub(source) else flags.url('from'),
    flags.url('out'),
    flags.url('store') if absl_flags.FLAGS.store else None,
  )
  for line in convert.lines(conversion):
    print(line)
