// Fetches the index. Whatever is wrong with it becomes one readable sentence.

const FORMAT_VERSION = 1;
const KEPT_SHARDS = 24;

export class DataError extends Error {}

async function fetchJson(name, build) {
  const query = build ? `?${build}` : '';
  let response;
  try {
    response = await fetch(`data/${name}${query}`,
      { cache: build ? 'default' : 'no-cache' });
  } catch {
    throw new DataError(
      `data/${name} could not be fetched: is the server still running?`);
  }
  if (!response.ok) {
    throw new DataError(`data/${name} is missing (HTTP ${response.status}): ` +
      'the index was not built, or building it was interrupted. ' +
      'Run sae-browse again.');
  }
  try {
    return await response.json();
  } catch {
    throw new DataError(
      `data/${name} is not valid JSON. Run sae-browse again.`);
  }
}

export async function load() {
  const meta = await fetchJson('meta.json');
  if (meta?.format_version !== FORMAT_VERSION) {
    throw new DataError(`data/meta.json has format ` +
      `${meta?.format_version}, this page reads ${FORMAT_VERSION}. ` +
      'Run sae-browse again.');
  }
  const [columns, vocabulary] = await Promise.all([
    fetchJson('columns.json', meta.build),
    fetchJson('vocabulary.json', meta.build),
  ]);
  for (const [name, column] of Object.entries(columns)) {
    if (column?.length !== meta.n_features) {
      throw new DataError(`data/columns.json has ${column?.length} entries ` +
        `of ${name}, not ${meta.n_features}. Run sae-browse again.`);
    }
  }
  if (vocabulary.length !== meta.vocabulary_size) {
    throw new DataError(`data/vocabulary.json has ${vocabulary.length} ` +
      `tokens, not ${meta.vocabulary_size}. Run sae-browse again.`);
  }
  const places = new Map(columns.latent.map((latent, i) => [latent, i]));
  const shards = new Map();

  // `place` is a position in the columns; latent numbers may have gaps.
  async function feature(place) {
    const size = meta.features_per_shard;
    const shard = Math.floor(place / size);
    const name = `features/${String(shard).padStart(5, '0')}.json`;
    const pending = shards.get(shard) ?? fetchJson(name, meta.build);
    shards.delete(shard);
    shards.set(shard, pending);
    if (shards.size > KEPT_SHARDS) shards.delete(shards.keys().next().value);
    let found;
    try {
      found = (await pending)[place % size];
    } catch (error) {
      shards.delete(shard);
      throw error;
    }
    if (found?.latent !== columns.latent[place]) {
      throw new DataError(`data/${name} does not hold latent ` +
        `${columns.latent[place]}. Run sae-browse again.`);
    }
    return found;
  }

  return {
    meta,
    columns,
    vocabulary,
    places,
    feature,
    previews: () => fetchJson('previews.json', meta.build),
  };
}
