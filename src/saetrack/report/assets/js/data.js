"use strict";
// Opens the containers of pack.py: the core of a track at once, the details of 128 features when one is asked for.

const ARRAYS = {
  uint8: Uint8Array, int8: Int8Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, float32: Float32Array,
};

async function unpack(base64) {
  const bytes = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(base64)
    : Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const arrays = {};
  for (const [name, [type, shape, offset]] of Object.entries(header.arrays)) {
    const size = shape.reduce((a, b) => a * b, 1);
    arrays[name] = { values: new ARRAYS[type](buffer, 4 + length + offset, size), shape };
  }
  return { facts: header.facts, arrays };
}

// In a folder the data are scripts that call this; a page opened from disk may load scripts, but fetch nothing.
const arriving = new Map();
window.saetrackChunk = (name, text) => arriving.get(name)(text);

function chunkText(name, folder) {
  const inline = document.getElementById(name);
  if (inline) return Promise.resolve(inline.textContent);
  return new Promise((resolve, reject) => {
    arriving.set(name, resolve);
    const script = document.createElement("script");
    script.src = `${encodeURIComponent(folder)}/${name}.js`;
    script.onload = () => script.remove();
    script.onerror = () => reject(new Error(`${script.src} is missing. Keep the folder ${folder} beside the page.`));
    document.head.append(script);
  });
}

class Track {
  static async open(number) {
    const element = document.getElementById(`core-${number}`);
    const { facts, arrays } = await unpack(element.textContent);
    return new Track(number, facts, arrays, element.dataset.folder);
  }

  constructor(number, facts, arrays, folder) {
    Object.assign(this, { number, facts, arrays, folder, steps: facts.steps, chunks: new Map() });
    this.letter = "AB"[number];
    this.words = facts.vocabulary;
    this.last = this.steps.length - 1;
  }

  column(key) {
    return this.arrays[`column.${key}`]?.values;
  }

  alive(feature, place = this.last) {
    return this.arrays.alive.values[feature * this.steps.length + place] === 1;
  }

  label(feature) {
    if (!this.arrays.labels) return [];
    return [...this.arrays.labels.values.subarray(3 * feature, 3 * feature + 3)].filter((n) => n).map((n) => this.words[n - 1]);
  }

  // Everything about one feature: `get(name)` is its part of an array, `get(name, place)` that of one checkpoint.
  async details(feature) {
    const chunk = Math.floor(feature / this.facts.chunk);
    if (!this.chunks.has(chunk)) this.chunks.set(chunk, chunkText(`t${this.number}-${chunk}`, this.folder).then(unpack));
    const { arrays } = await this.chunks.get(chunk);
    const row = feature % this.facts.chunk;
    const get = (name, place) => {
      if (!arrays[name]) return null;
      const { values, shape } = arrays[name];
      const size = shape.slice(1).reduce((a, b) => a * b, 1);
      const own = values.subarray(row * size, (row + 1) * size);
      return place === undefined ? own : own.subarray((place * size) / shape[1], ((place + 1) * size) / shape[1]);
    };
    return { feature, get, width: (name) => arrays[name]?.shape.at(-1) };
  }
}
