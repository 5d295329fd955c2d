"""The last stage: builds the page from the results of probing."""

from typing import Any

from absl import logging
from etils import epath

from sae_jax import subject as subject_lib
from sae_jax.browser import index
from sae_jax.features import explanations, results
from sae_jax.storage import finished, workdir
from sae_jax.subject.formats import tokenizer as tokenizer_lib

STAGE = 'sae-browse'


def vocabulary(report: dict[str, Any], subject: str = '') -> list[str | bytes]:
  """The text or bytes of each token of the subject that a report is about.

  Args:
    report: of sae-probe.
    subject: where the subject is now; '' for where it was.

  Raises:
    UserError: if it is not there, or is another model.
  """
  tokenizer = subject_lib.load_recorded_tokenizer(
    report['subject'], report.get('weights_sha256', ''), subject
  )
  return tokenizer_lib.token_texts(tokenizer)


def browse(config: index.BrowseConfig, probe_url: str, out_url: str) -> str:
  """Builds the feature page, or reuses one built from the same results.

  Args:
    config: options of the page.
    probe_url: the workdir of sae-probe, local path or URL.
    out_url: the folder that the page is written to.

  Returns:
    The URL of index.html.

  Raises:
    UserError: if the results are absent or unfinished, or the folder is in
      use, somebody else's or a page of other results.
  """
  report = results.read_report(probe_url)
  explained = explanations.of_results(probe_url, report)
  inputs = index.inputs(report, config, explained)
  made_from = {
    'probe': report.get('made_from'),
    'browse_config': inputs['browse_config'],
  }
  with workdir.hold(out_url, STAGE, made_from):
    if finished.vouches(out_url, inputs, index.NAMES):
      logging.info('%s is finished: reused', out_url)
      return str(epath.Path(out_url) / 'index.html')
    features = results.open_features(probe_url, report)
    words = vocabulary(report, config.subject)
    workdir.sign(out_url, STAGE, made_from)
    return index.build_index(
      features, report, words, out_url, config, explained
    )
