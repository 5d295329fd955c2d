"""A report in a few lines of text."""

import string
from typing import Any


class _Formatter(string.Formatter):
  """Formats null, which stands for no number."""

  def format_field(self, value, format_spec):
    return 'none' if value is None else super().format_field(value, format_spec)


def lines(report: dict[str, Any]) -> list[str]:
  """A summary of the report in a few lines of text."""
  text = _Formatter().format
  interval = text('[{delta_ce_low:.4f}, {delta_ce_high:.4f}]', **report)
  if report['delta_ce_low'] is None:
    interval = '(no interval of one document)'
  out = [
    'NMSE {nmse:.4f}  FVU {fvu:.4f}  (PCA with {pca_components} components '
    '{fvu_pca:.4f}, untrained {fvu_untrained:.4f})',
    'L0 {l0:.2f}  silent on the test tokens {dead_fraction:.2%}',
    'delta CE {delta_ce:.4f} nats {interval} '
    'from {ce:.4f}, recovered {ce_recovered:.3f} of zero-ablation, '
    'KL {kl:.4f}',
  ]
  if report['freeze'] != 'none':
    out.insert(0, 'a control: the {freeze} kept its initial weights')
  out = [text(line, **report, interval=interval) for line in out]
  for task, scores in report['probes'].items():
    controls = ', '.join(
      text('{} {test_auc:.3f}', name, **score)
      for name, score in scores['controls'].items()
    )
    known = scores['references']
    references = ', '.join(
      text('{} {test_auc:.3f}', name, **score)
      for name, score in (
        ('logistic', known['logistic']),
        ('mean difference', known['mean_difference']),
        *((f'{s["k"]}-sparse', s) for s in known['k_sparse'] if s['k'] == 16),
      )
    )
    out.append(
      text(
        '{}: AUC {test_auc:.3f} [{test_auc_low:.3f}, {test_auc_high:.3f}] '
        'by latent {best_latent}  ({}; of many inputs: {})',
        task,
        controls,
        references,
        **scores['latent'],
      )
    )
  return out
