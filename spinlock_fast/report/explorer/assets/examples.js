// Example rows of the selected code, and what is known of one row.

const MOST_EXAMPLES = 10;
const NEAREST = 5;

const rankOf = (g, at) => (column("rank/" + g)[at] / 255) ** 2; // share of the rows of its code that are nearer, see rows.py

let samplesOfCode = null; // [codes] indices of the examples that analyze chose

function samplesOf(code) {
  if (!samplesOfCode) {
    samplesOfCode = Array.from({ length: offsets.at(-1) }, () => []);
    column("sample/code").forEach((own, i) => samplesOfCode[own].push(i));
  }
  return samplesOfCode[code];
}

// Without a filter, the examples that analyze chose; else the rows of the filter that are nearest to the code.
function exampleRows(code) {
  const g = codebookOf(code);
  if (!state.filter.size) {
    const [kinds, rows] = ["kind", "row"].map(name => column("sample/" + name));
    return samplesOf(code).map(i => ({
      kind: H.samples[kinds[i]], at: rows[i], distance: column("sample/distance")[i], margin: column("sample/margin")[i],
    }));
  }
  const [own, ranks] = [tokens[g], column("rank/" + g)];
  const found = [];
  for (let i = 0; i < H.rows; i++) if (matching[i] && own[i] === code - offsets[g]) found.push(i);
  found.sort((a, b) => ranks[a] - ranks[b] || a - b);
  return found.slice(0, MOST_EXAMPLES).map(at => ({ kind: "nearest", at, nearer: rankOf(g, at) }));
}

// The place of a row among all rows of its code by distance, from 1; rows in the same of the 256 steps share a place. Large
// pages have the places of the nearest rows only.
function placeInCode(g, at) {
  const [own, ranks] = [tokens[g], column("rank/" + g)];
  let nearer = 0;
  for (let i = 0; i < H.rows; i++) nearer += own[i] === own[at] && ranks[i] < ranks[at];
  return ranks[at] === H.rank_limit ? `over ${integer(nearer)}` : integer(nearer + 1);
}

function showExamples() {
  const filtered = state.filter.size > 0;
  const rows = exampleRows(state.selected);
  const label = codeLabel(state.selected);
  byId("examples-heading").textContent = filtered ? `Example rows: ${label} in the filter` : `Example rows: ${label}`;
  byId("examples-help").textContent = !filtered
    ? "Rows nearest to the code, which are typical of it, random ones, and those at the boundary to another code. The margin is the " +
      "additional distance to the second-nearest code. Rows that match a filter are listed instead when there is one."
    : rows.length
      ? `The rows that have the code and match the filter, the most typical first. Rank 1 is the most typical of all ${counted(column("code/count")[state.selected], "row")} of the code.`
      : `No row has ${label} and matches the filter.`;
  if (rows.length) byId("examples-help").append(fieldsHelp());
  const kinds = rows.some(({ kind }) => kind !== "nearest");
  const g = codebookOf(state.selected);
  const body = rows.map(({ kind, at, distance, margin }) => {
    const row = element("button", { type: "button", textContent: String(column("rows")[at]), title: "Show this row", onclick: () => pinRow(at) });
    const values = filtered ? [placeInCode(g, at)] : [number(distance, 3), number(margin, 3)];
    const cells = [...(kinds ? [kind] : []), row, ...values].map(value => element("td", {}, value));
    if (H.fields) cells.push(element("td", { className: "fields" }, ...fieldsOf(at)));
    return element("tr", { onmouseenter: () => markRow(at), onmouseleave: () => markRow(null) }, ...cells);
  });
  byId("examples").hidden = !rows.length;
  const names = [...(kinds ? ["Kind"] : []), "Row", ...(filtered ? ["Rank"] : ["Distance", "Margin"]), ...(H.fields ? ["Fields"] : [])];
  byId("examples").replaceChildren(tableHead(names), element("tbody", {}, ...body));
}

// Squared distances of the codes of codebook g to one of them.
function codeDistances(g, code) {
  const { codes, dim } = H.codebooks[g];
  const vectors = column("vectors/" + g);
  return Float64Array.from({ length: codes }, (_, k) => {
    let sum = 0;
    for (let d = 0; d < dim; d++) sum += Math.fround(vectors[code * dim + d] - vectors[k * dim + d]) ** 2;
    return sum;
  });
}

// The other rows with the nearest tokens, by the distance of spinlock_fast.analysis.neighbours.
function nearestByTokens(at, count) {
  const squares = new Float64Array(H.rows);
  tokens.forEach((own, g) => {
    const square = codeDistances(g, own[at]);
    for (let i = 0; i < squares.length; i++) squares[i] += square[own[i]];
  });
  const nearest = [];
  for (let i = 0; i < squares.length; i++) {
    if (i === at || (nearest.length === count && squares[i] >= squares[nearest.at(-1)])) continue;
    const place = nearest.findIndex(other => squares[other] > squares[i]);
    nearest.splice(place < 0 ? nearest.length : place, 0, i);
    nearest.length = Math.min(nearest.length, count);
  }
  return nearest.map(i => ({ at: i, distance: Math.sqrt(squares[i]), equal: tokens.filter(own => own[i] === own[at]).length }));
}

function showRowPanel(at) {
  byId("row-panel").hidden = at === null;
  if (at === null) return;
  byId("row-heading").textContent = `Row ${column("rows")[at]}`;
  const conditions = H.conditions.flatMap(({ name }, c) => {
    const add = () => addToFilter([["condition/" + c, column("condition/" + c)[at]]]);
    const value = element("button", { type: "button", textContent: levelOf(c, at), title: "Add to the filter", onclick: add });
    return [element("dt", {}, ...breakable(name)), element("dd", {}, value)];
  });
  byId("row-fields").replaceChildren(...fieldsOf(at));
  byId("row-conditions").replaceChildren(...conditions);
  byId("row-tokens").replaceChildren(...H.categories.map((_, c) => tokenButton(c, at)));
  const body = nearestByTokens(at, NEAREST).map(each => {
    const row = element("button", { type: "button", textContent: String(column("rows")[each.at]), title: "Show this row", onclick: () => pinRow(each.at) });
    const cells = [row, number(each.distance, 3), `${each.equal} of ${tokens.length}`].map(value => element("td", {}, value));
    return element("tr", { onmouseenter: () => markRow(each.at), onmouseleave: () => markRow(null) }, ...cells);
  });
  byId("neighbours").replaceChildren(tableHead(["Row", "Distance", "Equal tokens"]), element("tbody", {}, ...body));
}

function startExamples() {
  addCsvButton(byId("examples-title"), "examples", () => [
    ["kind", "row", "distance", "margin", "share_nearer"],
    ...exampleRows(state.selected).map(each => [each.kind, column("rows")[each.at], each.distance ?? "", each.margin ?? "", each.nearer ?? ""]),
  ]);
  byId("row-close").onclick = () => pinRow(null);
  onChange(showExamples);
}
