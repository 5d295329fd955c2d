"""A stand-in for gcloud, xpk and kubectl that fails as the real ones do."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from tests.support.cloud.tools import STAND_IN, TRAIN, UV

FOLDER = pathlib.Path(__file__).parents[3] / 'tpu_scripts'
# What the scripts may use beside gcloud, xpk and kubectl.
TOOLS = (
  *('basename', 'bash', 'cat', 'date', 'dirname', 'env', 'git', 'grep', 'gzip'),
  *('head', 'hostname', 'kill', 'mkdir', 'mktemp', 'mv', 'rm', 'sed', 'setsid'),
  *('sleep', 'tail', 'tar', 'tee', 'tr'),
)


def executable(path, text):
  path.parent.mkdir(exist_ok=True)
  path.write_text(f'#!{sys.executable} -IS\n{text}')
  path.chmod(0o755)


class Cloud:
  """Stand-ins for gcloud, xpk and kubectl, and the scripts beside them."""

  def __init__(self, root):
    self.root = root
    for tool in ('gcloud', 'xpk', 'kubectl'):
      executable(root / 'bin' / tool, STAND_IN)
    executable(root / 'host_bin' / 'uv', UV)
    executable(root / 'host_bin' / 'train', TRAIN.format(root=str(root)))
    executable(root / 'image_bin' / 'sae-train', TRAIN.format(root=str(root)))
    (root / 'tools').mkdir()
    for tool in TOOLS:
      (root / 'tools' / tool).symlink_to(shutil.which(tool))
    for folder in ('home', 'tmp', 'hosts'):
      (root / folder).mkdir()
    kinds = 'queued nodes policies templates groups hosts clusters jobsets'
    self.write(
      {kind: {} for kind in kinds.split()}
      | {'faults': [], 'errors': [], 'repositories': [], 'images': []}
      | {'granted': 'ACTIVE', 'n_hosts': 2, 'hold': False}
    )

  def write(self, state):
    (self.root / 'state.json').write_text(json.dumps(state))

  @property
  def state(self):
    return json.loads((self.root / 'state.json').read_text())

  @contextlib.contextmanager
  def edit(self):
    """The state, which no stand-in reads or writes meanwhile."""
    with open(self.root / 'lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      state = self.state
      yield state
      self.write(state)

  def change(self, **changes):
    with self.edit() as state:
      state.update(changes)

  def fault(self, match, stderr, code=1, times=1):
    with self.edit() as state:
      state['faults'].append(
        dict(match=match, stderr=stderr, code=code, times=times)
      )

  def calls(self):
    """The calls since the last time."""
    log = self.root / 'calls.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]

  def environment(self, **settings):
    base = {
      'PATH': f'{self.root}/bin:{self.root}/tools',
      'HOME': str(self.root / 'home'),
      'TMPDIR': str(self.root / 'tmp'),
      'PROJECT': 'p',
      'BUCKET': 'gs://b',
      'RESULTS': str(self.root / 'results'),
      'POLL_SECONDS': '0',
      'EXCLUDE_NEWER': '2026-11-01',
      'ACCELERATOR_TYPE': 'v6e-8',
      'TOPOLOGY': '2x4',
    }
    return {k: v for k, v in (base | settings).items() if v is not None}

  def start(self, script, *arguments, **settings):
    return subprocess.Popen(
      ['bash', str(FOLDER / script), *arguments],
      cwd=self.root,
      env=self.environment(**settings),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, script, *arguments, **settings):
    process = self.start(script, *arguments, **settings)
    process.out, process.err = process.communicate(timeout=60)
    return process

  def ok(self, script, *arguments, **settings):
    done = self.run(script, *arguments, **settings)
    assert done.returncode == 0, done.err
    return done

  def one_line(self, code, *parts, script, action, **settings):
    """The script fails with this code; its last line has the parts."""
    done = self.run(script, action, **settings)
    assert done.returncode == code, done.err
    last = done.err.splitlines()[-1]
    assert last.startswith('error: ')
    for part in parts:
      assert part in last
    return done

  def until_finished(self, script, **settings):
    until = time.time() + 20
    while 'the run: finished' not in self.ok(script, 'status', **settings).err:
      assert time.time() < until

  def preempt(self):
    with self.edit() as state:
      for queued in state['queued'].values():
        queued['state']['state'] = 'SUSPENDED'
      for node in state['nodes'].values():
        node['state'] = 'PREEMPTED'
      for host in state['hosts'].values():
        host['instanceStatus'] = 'STOPPED'
      for job in state['jobsets'].values():
        job['status'] = {'terminalState': 'Failed', 'why': 'ReachedMaxRestarts'}
      for host in (self.root / 'hosts').iterdir():
        self.kill(host)
        shutil.rmtree(host)

  def kill(self, host):
    """Ends a host's run as a lost host does, without a word."""
    pid = host / 'sae_jax_run' / 'pid'
    if pid.exists():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(int(pid.read_text()), signal.SIGKILL)

  def trained(self):
    """The arguments of every sae-train that ran and is on disk."""
    logs = sorted(self.root.glob('hosts/*/trained.jsonl'))
    logs += self.root.glob('pod/trained.jsonl')
    lines = [line for log in logs for line in log.read_text().splitlines()]
    return [json.loads(line) for line in lines]
