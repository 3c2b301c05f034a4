// Associations of codebooks with conditions, the tree of codes of a category, and codes that co-occur.

const MOST_IN_ORDER = 12; // with more categories, the table is ordered by association

function showAssociations() {
  const { conditions, ami, null_q95: shuffled, q } = H.associations;
  if (!conditions.length) {
    byId("associations-panel").hidden = true;
    return;
  }
  byId("associations-help").textContent =
    "Adjusted mutual information over all rows, and below it the 95 % quantile for shuffled conditions. 0: independent, 1: one determines the other. " +
    `Bold: significant at a false discovery rate of ${H.alpha}. The colour is relative to the largest value. The conditions that are told best come first` +
    (H.categories.length > MOST_IN_ORDER ? ", and so do the codebooks that tell one best." : ".");
  byId("associations-summary").textContent = bestTold();
  const largest = Math.max(1e-9, ...ami.filter(value => value !== null));
  const association = (g, c) => ami[g * conditions.length + c] ?? -1;
  const books = H.codebooks.map((_, g) => g);
  const columns = conditions.map((_, c) => c);
  const ofBook = books.map(g => Math.max(...columns.map(c => association(g, c))));
  const ofColumn = columns.map(c => Math.max(...books.map(g => association(g, c))));
  const order = H.categories.length > MOST_IN_ORDER ? [...books].sort((a, b) => ofBook[b] - ofBook[a]) : books;
  columns.sort((a, b) => ofColumn[b] - ofColumn[a]);
  const body = order.map(g => {
    const cells = columns.map(c => {
      const i = g * conditions.length + c;
      const text = value => (value === null ? "–" : signed(value).replace("+", ""));
      const cell = element("td", { className: q[i] !== null && q[i] <= H.alpha ? "found" : "muted" }, text(ami[i]));
      cell.append(element("small", { textContent: text(shuffled[i]) }));
      cell.style.setProperty("--share", Math.max(0, ami[i] ?? 0) / largest);
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row", textContent: codebookLabel(g) }), ...cells);
  });
  byId("associations").replaceChildren(tableHead(["Codebook", ...columns.map(c => conditions[c])]), element("tbody", {}, ...body));
  addCsvButton(document.querySelector("#associations-panel h2"), "associations", () => [
    ["codebook", "condition", "ami", "null_q95", "q"],
    ...ami.map((value, i) => {
      const g = Math.floor(i / conditions.length);
      return [codebookLabel(g), conditions[i % conditions.length], value ?? NaN, shuffled[i] ?? NaN, q[i] ?? NaN];
    }),
  ]);
}

// The conditions that some codebook tells best, in words.
function bestTold() {
  const { conditions, ami, q } = H.associations;
  const best = conditions.map((name, c) => {
    const of = g => ami[g * conditions.length + c] ?? -1;
    const g = H.codebooks.reduce((most, _, i) => (of(i) > of(most) ? i : most), 0);
    return { name, g, value: of(g), q: q[g * conditions.length + c] };
  }).filter(each => each.q !== null && each.q <= H.alpha).sort((a, b) => b.value - a.value).slice(0, 4);
  if (!best.length) return "No codebook tells a condition better than by chance.";
  return "Told best: " + best.map((each, i) => `${each.name} by codebook ${codebookLabel(each.g)} (${number(each.value)}${i ? "" : " over all its codes"})`).join(", ") + ".";
}

const MOST_LEAVES = 1 << 20; // counted in an array, more of them in a map

// Number of the given rows with each path of codes such as "2", "2/1" and "2/1/4".
function countPaths(books, found) {
  const possible = books.reduce((product, g) => product * H.codebooks[g].codes, 1);
  const array = possible <= MOST_LEAVES ? new Uint32Array(possible) : null; // all codes of a path as one number -> rows
  const map = new Map();
  const own = books.map(g => tokens[g]);
  const sizes = books.map(g => H.codebooks[g].codes);
  let total = 0;
  for (let i = 0; i < H.rows; i++) {
    if (!found[i]) continue;
    total++;
    let leaf = 0;
    for (let level = 0; level < own.length; level++) leaf = leaf * sizes[level] + own[level][i];
    if (array) array[leaf]++;
    else map.set(leaf, (map.get(leaf) ?? 0) + 1);
  }
  const counts = new Map();
  const add = (count, leaf) => {
    if (!count) return;
    const numbers = [];
    for (let level = sizes.length - 1, rest = leaf; level >= 0; level--) {
      numbers.unshift(rest % sizes[level]);
      rest = Math.floor(rest / sizes[level]);
    }
    numbers.forEach((_, level) => {
      const path = numbers.slice(0, level + 1).join("/");
      counts.set(path, (counts.get(path) ?? 0) + count);
    });
  };
  (array ?? map).forEach(add);
  return { counts, total };
}

const LEVEL_HEIGHT = 52;
let treeWidth = 240; // measured when the window changes: it forces a layout

// The filter without the codes of some codebooks.
const withoutBooks = books => new Map([...state.filter].filter(([key]) => !books.some(g => key === "tokens/" + g)));

// Draws the rows of a category as nested boxes, from its coarsest level at the top to its finest.
function showTree() {
  const category = Number(byId("category").value);
  const books = codebooksOf(category);
  const others = withoutBooks(books);
  const { counts, total } = countPaths(books, match(others));
  byId("tree-help").textContent =
    `${integer(total)} rows${others.size ? " that match the other terms of the filter" : ""}: the width is the number of rows, ` +
    `each level divides the one above (${books.map(g => "L" + H.codebooks[g].level).join(", ")}). Click to filter.`;
  const width = treeWidth;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${LEVEL_HEIGHT * books.length}`, height: LEVEL_HEIGHT * books.length });
  const children = new Map();
  for (const path of counts.keys()) {
    const parent = path.includes("/") ? path.slice(0, path.lastIndexOf("/")) : "";
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(path);
  }
  const draw = (parent, left, depth) => {
    const paths = (children.get(parent) ?? []).sort((a, b) => counts.get(b) - counts.get(a) || NAMES.compare(a, b));
    paths.forEach((path, i) => {
      const size = (counts.get(path) / total) * width;
      if (size >= 1) { // narrower boxes cannot be seen
        drawBox(plot, { path, left, depth, size, faint: i % 2, category, books, count: counts.get(path), total });
        draw(path, left, depth + 1);
      }
      left += size;
    });
  };
  draw("", 0, 0);
  byId("tree").replaceChildren(...(total ? [plot] : []));
}

function drawBox(plot, { path, left, depth, size, faint, category, books, count, total }) {
  const numbers = path.split("/").map(Number);
  const codes = numbers.map((own, level) => offsets[books[level]] + own);
  const term = H.categories[category].short + "=" + path;
  const box = svg("rect", { x: left, y: depth * LEVEL_HEIGHT, width: size, height: LEVEL_HEIGHT, "fill-opacity": faint ? 0.28 : 0.45 });
  if (codes.at(-1) === state.selected) box.classList.add("current");
  box.append(svg("title", {}, `${term}: ${integer(count)} rows, ${percent(count / total)}`));
  box.addEventListener("click", () => {
    update({ filter: new Map([...withoutBooks(books), ...codes.map(codeTerm)]), selected: codes.at(-1) });
  });
  plot.append(box);
  const text = String(numbers.at(-1));
  if (size > 8 * text.length + 4)
    plot.append(svg("text", { x: left + size / 2, y: (depth + 0.5) * LEVEL_HEIGHT + 4, "text-anchor": "middle" }, text));
}

function pairRows() {
  const [a, b, counts, expected] = ["a", "b", "count", "expected"].map(name => column("pair/" + name));
  const rows = [];
  for (let i = 0; i < (a?.length ?? 0); i++)
    if (a[i] === state.selected || b[i] === state.selected)
      rows.push({ code: a[i] === state.selected ? b[i] : a[i], count: counts[i], expected: expected[i] });
  return rows; // by increasing p
}

function showPairs() {
  const rows = pairRows();
  byId("pairs-help").textContent = column("pair/a")
    ? `${counted(rows.length, "code")} of other categories ${rows.length === 1 ? "occurs" : "occur"} together with ${codeLabel(state.selected)} more or less often than by chance${state.filter.size ? " among all rows, whatever the filter" : ""}` +
      (rows.length > TOP ? `; the ${TOP} with the smallest p:` : rows.length ? ":" : ".")
    : "There is only one category.";
  const body = rows.slice(0, TOP).map(({ code, count, expected }) => {
    const name = element("button", { type: "button", textContent: codeLabel(code), title: "Select", onclick: () => update({ selected: code }) });
    const both = element("button", { type: "button", textContent: integer(count), title: "Filter by both codes", onclick: () => addToFilter([state.selected, code].map(codeTerm)) });
    const cells = [name, both, number(expected, 1), number(count / expected, count < 10 * expected ? 2 : 1) + " ×"].map(value => element("td", {}, value));
    return element("tr", {}, ...cells);
  });
  byId("pairs").hidden = !rows.length;
  byId("pairs").replaceChildren(tableHead(["Code", "Rows", "By chance", "Ratio"]), element("tbody", {}, ...body));
}

function startOverview() {
  showAssociations();
  const select = byId("category");
  H.categories.forEach((category, c) => {
    const text = category.name === category.short ? category.name : `${category.short} (${category.name})`;
    select.append(element("option", { value: String(c), textContent: text }));
  });
  select.onchange = showTree;
  let last = null;
  onChange(() => {
    if (state.selected !== last) select.value = String(H.codebooks[codebookOf(state.selected)].category);
    last = state.selected;
    showTree();
    showPairs();
  });
  const measure = () => (treeWidth = Math.max(240, byId("tree").clientWidth));
  measure();
  window.addEventListener("resize", () => {
    measure();
    showTree();
  });
  addCsvButton(byId("pairs-heading"), "cooccurrence", () => [
    ["code", "with", "rows", "rows_by_chance", "ratio"],
    ...pairRows().map(row => [codeLabel(state.selected), codeLabel(row.code), row.count, row.expected, row.count / row.expected]),
  ]);
}
