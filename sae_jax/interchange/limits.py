"""What an autoencoder has that a format has no word for."""

from collections.abc import Collection

from sae_jax.interchange import folding, imported

# Those that are folded into the weights where they must be.
_FOLDED = ('none', 'dataset')


def lack(
  of: imported.Imported,
  nonlinearities: Collection[str],
  normalisations: Collection[str] = (),
  transcodes: bool = False,
  rectifies: bool = True,
) -> str | None:
  """A property of an autoencoder beyond these, in words; None if there is none.

  Args:
    of: what it is.
    nonlinearities: those that are possible.
    normalisations: those that are, besides what can be folded.
    transcodes: whether transcoders are.
    rectifies: whether all latents are made 0 where they are below.
  """
  semantics = of.semantics
  if semantics.nonlinearity not in nonlinearities:
    return f'the nonlinearity {semantics.nonlinearity}'
  if semantics.normalisation not in (*_FOLDED, *normalisations):
    return f'the normalisation {semantics.normalisation} of each token'
  if not transcodes and imported.is_transcoder(of):
    return f'another site or width that it writes ({_written(of)})'
  if rectifies and not folding.is_rectified(of):
    return 'latents below 0 (no ReLU after the nonlinearity)'
  return None


def of_one_width(of: imported.Imported) -> str | None:
  """`lack` of a format that has one width alone."""
  if of.d_in == of.d_out:
    return None
  return f'width {of.d_in} that it reads and {of.d_out} that it writes'


def _written(of: imported.Imported) -> str:
  site = of.provenance.target_site
  if site is not None:
    return site
  return 'a skip connection' if of.d_in == of.d_out else f'width {of.d_out}'
