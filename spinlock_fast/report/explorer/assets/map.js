// The map of all rows on a canvas: grey points, coloured where a row matches the filter or has the selected code.

const REACH = 12; // pixels within which a point is found
let pinned = null; // row whose tokens are shown, and of which others are hovered only if there is none
let marked = null;
let background = null; // layers of the canvas: all rows in grey, and the coloured ones
let highlight = null;
let points = { x: new Float32Array(0), y: new Float32Array(0) };

function layoutMap() {
  const canvas = byId("map");
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const [x, y] = [column("map/x"), column("map/y")];
  const largest = values => values.reduce((a, b) => Math.max(a, b), 1);
  const scale = Math.min((width - 16) / largest(x), (height - 16) / largest(y)); // equal on both axes
  const left = (width - largest(x) * scale) / 2;
  const top = (height - largest(y) * scale) / 2;
  points = { x: Float32Array.from(x, value => left + value * scale), y: Float32Array.from(y, value => height - top - value * scale) };
  drawBackground();
}

const colours = new Map(); // kept, as reading one computes the style of the whole page; forgotten when the scheme changes
const colour = name => {
  if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return colours.get(name);
};

// A canvas of the size of the map with squares at the wanted rows, written as pixels: many calls of fillRect are slower.
function pointLayer(size, colourName, wanted) {
  const { width, height } = byId("map");
  const layer = element("canvas", { width, height });
  if (!width || !height) return layer;
  const context = layer.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const hex = colour(colourName).replace(/^#(.)(.)(.)$/, "#$1$1$2$2$3$3");
  new Uint8Array(pixels.buffer, 0, 4).set([1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16)).concat(255));
  const value = pixels[0];
  pixels[0] = 0;
  const ratio = window.devicePixelRatio || 1;
  const side = Math.max(1, Math.round(size * ratio));
  for (let i = 0; i < H.rows; i++) {
    if (!wanted(i)) continue;
    const left = Math.max(0, Math.min(width - side, Math.round(points.x[i] * ratio - side / 2)));
    const top = Math.max(0, Math.min(height - side, Math.round(points.y[i] * ratio - side / 2)));
    for (let y = top; y < top + side; y++) pixels.fill(value, y * width + left, y * width + left + side);
  }
  context.putImageData(image, 0, 0);
  return layer;
}

const pointSize = () => (H.rows > 20_000 ? 1.5 : H.rows > 3000 ? 2.2 : 3.5);

function drawBackground() {
  background = pointLayer(pointSize(), "--faint", () => true);
  drawHighlight();
}

function drawHighlight() {
  const g = codebookOf(state.selected);
  const own = tokens[g];
  const selected = state.selected - offsets[g];
  const count = state.filter.size ? matches : column("code/count")[state.selected];
  const size = count < 100 ? Math.max(5, 1.6 * pointSize()) : 1.6 * pointSize(); // a few must be seen among many
  highlight = pointLayer(size, "--accent", state.filter.size ? i => matching[i] === 1 : i => own[i] === selected);
  drawMap();
}

function drawMap() {
  const canvas = byId("map");
  const context = canvas.getContext("2d");
  const ratio = window.devicePixelRatio || 1;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (const layer of [background, highlight]) if (layer.width && layer.height) context.drawImage(layer, 0, 0);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.strokeStyle = colour("--second");
  context.lineWidth = 2;
  for (const at of [pinned, marked]) {
    if (at === null) continue;
    context.beginPath();
    context.arc(points.x[at], points.y[at], 6, 0, 2 * Math.PI);
    context.stroke();
  }
}

function nearestPoint(event) {
  const frame = byId("map").getBoundingClientRect();
  const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
  let best = null;
  let least = REACH * REACH;
  for (let i = 0; i < H.rows; i++) {
    const distance = (points.x[i] - x) ** 2 + (points.y[i] - y) ** 2;
    if (distance < least) [best, least] = [i, distance];
  }
  return best;
}

function tokenButton(category, at) {
  const books = codebooksOf(category);
  const text = H.categories[category].short + "=" + books.map(g => tokens[g][at]).join("/");
  const filter = () => addToFilter(books.map(g => ["tokens/" + g, tokens[g][at]]));
  return element("button", { type: "button", textContent: text, title: "Add to the filter", onclick: filter });
}

function showRow(at) {
  const readout = byId("readout");
  if (at === null) readout.textContent = "Point at a row to see its number and tokens; click to keep it.";
  else readout.replaceChildren(`Row ${column("rows")[at]}: `, ...H.categories.map((_, c) => tokenButton(c, at)));
  if (at !== null && at === pinned) readout.append(goButton("More about it", "row-panel"));
}

function markRow(at) {
  marked = at;
  drawMap();
  showSeries();
}

function pinRow(at) {
  pinned = at;
  showRow(at);
  showRowPanel(at);
  drawMap();
  showSeries();
}

function startMap() {
  const canvas = byId("map");
  canvas.addEventListener("pointermove", event => {
    if (pinned !== null) return;
    const at = nearestPoint(event);
    if (at === marked) return;
    showRow(at);
    markRow(at);
  });
  canvas.addEventListener("pointerleave", () => markRow(null));
  canvas.addEventListener("click", event => pinRow(nearestPoint(event)));
  window.addEventListener("resize", layoutMap);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    colours.clear();
    drawBackground();
  });
  showRow(null);
  onChange(() => {
    byId("map-help").textContent =
      "First two principal components of the code vectors, scaled as for the distance of tokens. Coloured: " +
      (state.filter.size ? "rows that match the filter." : `rows with ${codeLabel(state.selected)}.`);
    drawHighlight();
  });
}
