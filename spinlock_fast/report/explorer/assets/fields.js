// Small pictures of fields, for rows that have them: 0..254 along a scale of colours, 255 where a value is not finite.

// Viridis (matplotlib, CC0) at equal steps, readable with each colour-vision deficiency.
const SCALE = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
const NOT_FINITE = [214, 39, 40];
let palette = null; // [256] pixel -> colour as in the memory of a canvas
let placeOf = null; // row -> its place among the pictures

function colourOf(pixel) {
  if (pixel === 255) return NOT_FINITE;
  const at = (pixel / 254) * (SCALE.length - 1);
  const below = Math.min(Math.floor(at), SCALE.length - 2);
  return SCALE[below].map((value, i) => value + (at - below) * (SCALE[below + 1][i] - value));
}

function makePalette() {
  const colours = new Uint8Array(4 * 256);
  for (let pixel = 0; pixel < 256; pixel++) colours.set([...colourOf(pixel), 255], 4 * pixel);
  return new Uint32Array(colours.buffer);
}

function fieldCanvas(kind, place, label) {
  const { height, width } = H.fields.kinds[kind];
  const canvas = element("canvas", { width, height, className: "field", role: "img", "aria-label": label, title: label });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = column("field/" + kind).subarray(place * height * width, (place + 1) * height * width);
  palette ??= makePalette();
  const shown = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) shown[i] = palette[pixels[i]];
  context.putImageData(image, 0, 0);
  return canvas;
}

// The pictures of a row, none if there are none.
function fieldsOf(at) {
  if (!H.fields) return [];
  placeOf ??= new Map([...column("field/rows")].map((row, i) => [row, i]));
  const place = placeOf.get(at);
  if (place === undefined) return [];
  return H.fields.kinds.map(({ name }, kind) => fieldCanvas(kind, place, `Row ${column("rows")[at]}: ${name} of ${H.fields.channel}`));
}

function fieldsHelp() {
  if (!H.fields) return "";
  const kinds = H.fields.kinds.map(({ name, low, high }) => `${name} from ${short(low)} (dark) to ${short(high)} (light)`);
  return ` Fields, ${H.fields.channel}: ${kinds.join("; ")}; red where not finite.`;
}
