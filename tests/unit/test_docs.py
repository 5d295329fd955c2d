"""Documents say what is so: commands parse, code and links lead somewhere."""

import subprocess

import pytest

from tests.support import binaries, documents

ROOT = documents.ROOT
NOTEBOOKS = sorted(ROOT.glob('experiments/colab/*.ipynb'))
GUIDES = [
  ROOT / 'README.md',
  *sorted(ROOT.glob('docs/*.md')),
  ROOT / 'tpu_scripts' / 'README.md',
]
PAGES = [
  *GUIDES,
  ROOT / 'CONTRIBUTING.md',
  ROOT / 'CHANGELOG.md',
  *sorted(ROOT.glob('sae_jax/**/*.md')),
  *sorted(ROOT.glob('tests/**/*.md')),
]


def name(path):
  """What a test of a document is called."""
  return str(path.relative_to(ROOT))


def known_flags():
  """The names of all flags of the binaries."""
  return {'help'}.union(*map(binaries.flags_of, binaries.COMMANDS))


@pytest.mark.parametrize('path', GUIDES, ids=name)
def test_commands_are_ones_that_their_programs_take(path):
  assert documents.command_complaints(path.read_text()) == []


def test_the_documents_have_commands_of_every_binary():
  """Else the test above might have looked at nothing."""
  programs = {
    command[0]
    for path in GUIDES
    for block in documents.blocks(path.read_text(), 'sh')
    for command in documents.words(block)
  }
  assert {*binaries.MODULES, 'make', 'python'} <= programs
  assert 'tpu_scripts/queued_resource.sh' in programs


def test_flags_in_the_text_exist():
  known = known_flags()
  for path in GUIDES[:-1]:
    assert documents.flag_complaints(path.read_text(), known) == []


@pytest.mark.parametrize('path', PAGES, ids=name)
def test_links_lead_somewhere(path):
  assert documents.link_complaints(path) == []


@pytest.mark.parametrize('path', PAGES, ids=name)
def test_python_in_the_documents_uses_what_is_there(path):
  # The blocks of a document are one program.
  blocks = documents.blocks(path.read_text(), 'python')
  assert documents.code_complaints('\n'.join(blocks)) == []


@pytest.mark.parametrize('path', NOTEBOOKS, ids=name)
def test_notebooks_say_what_is_so(path):
  text = '\n\n'.join(documents.cells(path, 'markdown'))
  assert documents.command_complaints(text) == []
  assert documents.link_complaints(path, text) == []
  # The cells are one program.
  code = '\n'.join(documents.cells(path, 'code'))
  assert 'import' in code
  assert documents.code_complaints(code) == []


def test_every_page_is_linked_from_the_readme():
  text = (ROOT / 'README.md').read_text()
  for path in ROOT.glob('docs/*.md'):
    assert f'(docs/{path.name}' in text


@pytest.mark.parametrize(
  ('command', 'complaint'),
  [
    ('sae-train --store=S --workdir=T --colour=1', "flag 'colour'"),
    ('sae-train --store=S --workdir=T --steps=1.5', 'is not an integer'),
    ('sae-train --store=S --workdir=T --steps=0', 'steps 0 must be 1 or more'),
    ('sae-train --store=S --workdir=T --k=9999', 'k 9999 exceeds n_latents'),
    ('sae-train --store=S', '--workdir'),
    ('sae-train --store=S --workdir=T 5', '5 is not a flag'),
    ('A=1 && sae-probe \\\n  --n=5', "flag 'n'"),
    ('sae-plan --topology=v6e:16x16 --tokens=10e-9', 'is not an integer'),
    ('python -m experiments.none --k=1', 'there is no module'),
    ('python experiments/quickstart.py --colour=1', "flag 'colour'"),
    ('make cake', 'no target cake'),
    ('make demo CAKE=1', 'no variable CAKE'),
    ("make demo FLAGS='--steps=many'", 'is not an integer'),
    ('tpu_scripts/none.sh create', 'there is no tpu_scripts/none.sh'),
    ('tpu_scripts/gke.sh fly', 'no action fly'),
    ("export TRAIN_FLAGS='--mesh_latent=many'", 'is not an integer'),
    ("pip install -e '.[cake]'", 'no extra cake'),
  ],
)
def test_a_wrong_command_is_seen(command, complaint):
  (said,) = documents.command_complaints(f'```sh\n{command}\n```\n')
  assert complaint in said


def test_a_command_in_the_text_may_lack_what_is_required():
  assert documents.command_complaints('with `sae-train --steps=5` and') == []
  (said,) = documents.command_complaints('with `sae-train --colour=5` and')
  assert "flag 'colour'" in said
  assert documents.flag_complaints('see `--colour=1`', known_flags()) == [
    '--colour=1: no program has it'
  ]


@pytest.mark.parametrize(
  ('text', 'complaint'),
  [
    ('[a](docs/none.md)', 'docs/none.md is not there'),
    ('[a](LICENSE#none)', 'LICENSE#none has no such heading'),
    ('[a](#none)', '#none has no such heading'),
    ('see `experiments/none.py`', '`experiments/none.py` is not there'),
  ],
)
def test_a_link_to_nowhere_is_seen(text, complaint):
  assert documents.link_complaints(ROOT / 'README.md', text) == [
    f'README.md: {complaint}'
  ]
  assert (
    documents.link_complaints(
      ROOT / 'README.md', '[a](https://b.c) [d](LICENSE) [e](#citation)'
    )
    == []
  )


def test_anchors_are_those_of_github():
  text = '# A `b` (c), d\n```sh\n# e\n```\n## On-line: 1/2 f_g\n'
  assert documents.anchors(text) == ['a-b-c-d', 'on-line-12-f_g']


@pytest.mark.parametrize(
  ('code', 'complaint'),
  [
    ('import sae_jax\nsae_jax.cake', 'sae_jax.cake is not there'),
    ('from sae_jax import cake', 'from sae_jax import cake'),
    ('from sae_jax.config import cake', 'import cake'),
    (
      'from sae_jax import config\nconfig.to_json()',
      "config.to_json(): missing a required argument: 'record'",
    ),
    (
      'from sae_jax import config\nc = config.Config()\nc.cake',
      'c.cake is not there',
    ),
    ('def f(:', 'invalid syntax'),
  ],
)
def test_code_that_would_fail_is_seen(code, complaint):
  (said,) = documents.code_complaints(code)
  assert complaint in said


def test_a_check_leaves_no_flags_behind():
  before = set(documents.absl_flags.FLAGS)
  documents.command_complaints('```sh\nsae-plan --mesh=auto\n```\n')
  assert set(documents.absl_flags.FLAGS) == before


def test_every_document_is_looked_at():
  tracked = subprocess.run(
    ['git', 'ls-files', '*.md'], cwd=ROOT, capture_output=True, text=True
  )
  # An archive of the source has no list of what is tracked.
  if not (ROOT / '.git').exists():
    pytest.skip('no .git here: only a checkout says which documents it tracks')
  assert not tracked.returncode, tracked.stderr
  assert {ROOT / line for line in tracked.stdout.split()} <= set(PAGES)
