// The data of the page: a header (JSON) and columns of numbers, see page.py. Nothing else is read.

const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

async function unpack(base64) {
  const text = atob(base64.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const columns = new Map();
  for (const [name, [kind, offset, count]] of Object.entries(header.columns))
    columns.set(name, new ARRAYS[kind](buffer, 4 + length + offset, count));
  return { header, columns };
}

let H; // header
let column; // name -> typed array, undefined for a missing one
let tokens; // one array [rows] per codebook
let offsets; // index of the first code of each codebook among all codes
let bookOfCode; // [codes] number of the codebook
let slots; // code -> row of the profile, -1 for an unused code

function setData(data) {
  H = data.header;
  column = name => data.columns.get(name);
  tokens = H.codebooks.map((_, g) => column("tokens/" + g));
  offsets = [0];
  for (const book of H.codebooks) offsets.push(offsets.at(-1) + book.codes);
  bookOfCode = Uint16Array.from(H.codebooks.flatMap((book, g) => Array(book.codes).fill(g)));
  slots = new Int32Array(offsets.at(-1)).fill(-1);
  column("profile/codes").forEach((code, slot) => (slots[code] = slot));
}

// A code is an index into all codes; it belongs to codebook g and has a number within it.
const codebookOf = code => bookOfCode[code];

function codebookLabel(g) {
  const book = H.codebooks[g];
  return H.categories[book.category].short + " L" + book.level;
}

function codeLabel(code) {
  const g = codebookOf(code);
  return codebookLabel(g) + " = " + (code - offsets[g]);
}

function codebooksOf(category) {
  return H.codebooks.map((_, g) => g).filter(g => H.codebooks[g].category === category);
}
