// Fetches the index. Whatever is wrong with it becomes one readable sentence.

import { checkColumns, checkFeature, checkMeta, checkPreviews, checkVocabulary,
  DataError } from './checks.js';

const FORMAT_VERSION = 4;
const KEPT_SHARDS = 24;
const LONGEST = 2 ** 29; // characters of a text in Chromium

export { DataError };

// The scripts came out of a browser's cache, the data did not.
export class StalePage extends Error {}

// The digest that a build adds to the address of a script.
export const versionOf = (address) => new URL(address).search.slice(1);

async function fetchJson(name, query, cache) {
  let response;
  try {
    response = await fetch(`data/${name}${query}`, { cache });
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
    const size = Number(response.headers.get('content-length'));
    if (size >= LONGEST) {
      throw new DataError(`data/${name} has ${Math.round(size / 2 ** 20)} MiB, ` +
        `more than a browser can read (${LONGEST / 2 ** 20} MiB): there are ` +
        'too many latents for this page.');
    }
    throw new DataError(
      `data/${name} is not valid JSON. Run sae-browse again.`);
  }
}

// A file of a build, as `check` wants it. The browser may have kept a damaged
// one at the address that the whole one has again: then the server is asked.
async function fetchChecked(name, build, check) {
  for (const cache of ['default', 'reload']) {
    try {
      const value = await fetchJson(name, `?${build}`, cache);
      check(value);
      return value;
    } catch (error) {
      if (cache === 'reload') throw error;
    }
  }
}

// `scripts` are the addresses of scripts that have to be of the data's version.
export async function load(scripts) {
  const meta = await fetchJson('meta.json', '', 'no-cache');
  if (typeof meta?.page === 'string'
    && [import.meta.url, ...scripts].map(versionOf)
      .some((version) => version && version !== meta.page)) {
    throw new StalePage(meta.page);
  }
  if (meta?.format_version !== FORMAT_VERSION) {
    throw new DataError(`data/meta.json has format ` +
      `${meta?.format_version}, this page reads ${FORMAT_VERSION}. ` +
      'Run sae-browse again.');
  }
  checkMeta(meta);
  const [columns, vocabulary] = await Promise.all([
    fetchChecked('columns.json', meta.build, (v) => checkColumns(v, meta)),
    fetchChecked('vocabulary.json', meta.build,
      (v) => checkVocabulary(v, meta)),
  ]);
  const places = new Map(columns.latent.map((latent, i) => [latent, i]));
  if (places.size !== meta.n_features) {
    throw new DataError('data/columns.json has a latent twice. ' +
      'Run sae-browse again.');
  }
  const shards = new Map();

  // `place` is a position in the columns; latent numbers may have gaps.
  async function feature(place) {
    const size = meta.features_per_shard;
    const shard = Math.floor(place / size);
    const name = `features/${String(shard).padStart(5, '0')}.json`;
    const check = (entries) => {
      const { [place % size]: entry } = entries ?? [];
      if (entry?.latent !== columns.latent[place]) {
        throw new DataError(`data/${name} does not hold latent ` +
          `${columns.latent[place]}. Run sae-browse again.`);
      }
      checkFeature(entry, `${name}: latent ${entry.latent}`, meta);
    };
    const pending = shards.get(shard) ?? fetchChecked(name, meta.build, check);
    shards.delete(shard);
    shards.set(shard, pending);
    if (shards.size > KEPT_SHARDS) shards.delete(shards.keys().next().value);
    try {
      const entries = await pending;
      check(entries);
      return entries[place % size];
    } catch (error) {
      shards.delete(shard);
      throw error;
    }
  }

  return {
    meta,
    columns,
    vocabulary,
    places,
    feature,
    previews: () => fetchChecked('previews.json', meta.build,
      (v) => checkPreviews(v, meta)),
  };
}
