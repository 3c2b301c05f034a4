// The table of codes, and the example rows of the selected one.

const CODE_COLUMNS = [
  { name: "Code", key: row => row.code },
  { name: "Rows", key: row => -row.count, text: row => integer(row.count) },
  { name: "Share", key: row => -row.count, text: row => percent(row.share) },
  { name: "Distance", key: row => row.distance, text: row => number(row.distance), title: "Median distance of the latents to the code" },
  { name: "In filter", key: row => -row.inFilter, text: row => integer(row.inFilter) },
];
const MOST_ROWS = 200;
let allCounts = null; // rows of each code, counted once
let sorting = { column: 0, reverse: false, all: false };

function codeRows() {
  const inFilter = countCodes(matching);
  allCounts ??= countCodes(new Uint8Array(H.rows).fill(1));
  const chosen = byId("codebook").value;
  const rows = [];
  for (let g = 0; g < H.codebooks.length; g++)
    for (let code = offsets[g]; code < offsets[g + 1] && (chosen === "" || Number(chosen) === g); code++)
      rows.push({
        code, count: allCounts[code], share: allCounts[code] / H.rows, inFilter: inFilter[code],
        distance: column("code/distance")[code], margin: column("code/margin")[code],
      });
  const key = CODE_COLUMNS[sorting.column].key;
  const last = value => (Number.isNaN(value) ? Infinity : value);
  rows.sort((a, b) => (last(key(a)) - last(key(b)) || a.code - b.code) * (sorting.reverse ? -1 : 1));
  return rows;
}

function showCodes() {
  const filtered = state.filter.size > 0;
  const shown = CODE_COLUMNS.filter((_, i) => filtered || i < 4);
  const head = shown.map((each, i) => {
    const sort = () => {
      sorting = { ...sorting, column: i, reverse: sorting.column === i && !sorting.reverse };
      showCodes();
    };
    const arrow = sorting.column === i ? (sorting.reverse ? " ▴" : " ▾") : "";
    const button = element("button", { type: "button", textContent: each.name + arrow, title: each.title ?? "Sort", onclick: sort });
    const order = sorting.column === i ? (sorting.reverse ? "descending" : "ascending") : "none";
    return element("th", { scope: "col", "aria-sort": order }, button);
  });
  const rows = codeRows();
  const body = rows.slice(0, sorting.all ? rows.length : MOST_ROWS).map(row => {
    const className = "clickable" + (row.code === state.selected ? " current" : row.code === state.compared ? " second" : "");
    const name = element("button", { type: "button", textContent: codeLabel(row.code) });
    const cells = shown.slice(1).map(each => element("td", { textContent: each.text(row) }));
    const select = () => update({ selected: row.code });
    return element("tr", { className, onclick: select, "data-code": row.code }, element("td", {}, name), ...cells);
  });
  if (rows.length > MOST_ROWS && !sorting.all) {
    const more = () => {
      sorting.all = true;
      showCodes();
    };
    const button = element("button", { type: "button", textContent: `Show all ${integer(rows.length)} codes`, onclick: more });
    body.push(element("tr", {}, element("td", { colSpan: shown.length }, button)));
  }
  const focused = document.activeElement.closest("#codes tbody") !== null;
  byId("codes").replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  if (focused) document.querySelector("#codes tr.current button")?.focus({ preventScroll: true });
}

function startCodes() {
  const select = byId("codebook");
  select.append(element("option", { value: "", textContent: "all" }));
  H.codebooks.forEach((book, g) => {
    const name = H.categories[book.category].name;
    select.append(element("option", { value: String(g), textContent: `${codebookLabel(g)} (${name}, ${book.codes} codes)` }));
  });
  select.onchange = showCodes;
  addCsvButton(document.querySelector("#codes-panel .controls"), "codes", () => [
    ["codebook", "code", "rows", "share", "distance_median", "margin_median", "rows_in_filter"],
    ...codeRows().map(row => {
      const g = codebookOf(row.code);
      return [codebookLabel(g), row.code - offsets[g], row.count, row.share, row.distance, row.margin, row.inFilter];
    }),
  ]);
  onChange(showCodes);
}

function sampleRows(code) {
  const [codes, kinds, rows] = ["code", "kind", "row"].map(name => column("sample/" + name));
  const found = [];
  for (let i = 0; i < codes.length; i++)
    if (codes[i] === code)
      found.push({ kind: H.samples[kinds[i]], at: rows[i], distance: column("sample/distance")[i], margin: column("sample/margin")[i] });
  return found;
}

function showExamples() {
  const body = sampleRows(state.selected).map(({ kind, at, distance, margin }) => {
    const row = element("button", { type: "button", textContent: String(column("rows")[at]), title: "Show its tokens", onclick: () => pinRow(at) });
    const cells = [kind, row, number(distance, 3), number(margin, 3)].map(value => element("td", {}, value));
    return element("tr", { onmouseenter: () => markRow(at), onmouseleave: () => markRow(null) }, ...cells);
  });
  byId("examples").replaceChildren(tableHead(["Kind", "Row", "Distance", "Margin"]), element("tbody", {}, ...body));
}

function startExamples() {
  byId("examples-help").textContent =
    "Rows nearest to the code, random ones, and those at the boundary to another code. The margin is the additional distance to the second-nearest code.";
  addCsvButton(document.querySelector("#examples-panel h2"), "examples", () => [
    ["kind", "row", "distance", "margin"],
    ...sampleRows(state.selected).map(each => [each.kind, column("rows")[each.at], each.distance, each.margin]),
  ]);
  onChange(showExamples);
}
