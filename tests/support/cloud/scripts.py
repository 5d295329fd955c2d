"""The scripts, and how far tests drive them before they look."""

import subprocess

SCRIPTS = ('queued_resource.sh', 'instance_group.sh', 'gke.sh')
ON_HOSTS = SCRIPTS[:2]
TRY_LATER = 75
# Which call creates, by script, and what the cloud says against it.
CREATE = {
  'queued_resource.sh': 'queued-resources create',
  'instance_group.sh': 'managed create',
  'gke.sh': 'cluster create',
}
QUOTA = (
  'ERROR: RESOURCE_EXHAUSTED: Quota limit '
  "'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 "
  'in zone us-east5-a.'
)
NO_CAPACITY = (
  'ERROR: There is no more capacity in the zone "us-east5-a"; you can try in '
  'another zone where Cloud TPU Nodes are offered'
)


def installed(cloud, script, **settings):
  cloud.ok(script, 'create', **settings)
  cloud.ok(script, 'install', **settings)


def hold(cloud):
  """Runs do not end until `release`."""
  (cloud.root / 'hold').touch()
  cloud.change(hold=True)


def release(cloud):
  (cloud.root / 'hold').unlink()
  cloud.change(hold=False)


def call(cloud, argv):
  return subprocess.run(
    argv,
    executable=cloud.root / 'bin' / argv[0],
    env=cloud.environment(),
    capture_output=True,
    text=True,
  )
