// The table of codes: in the order of their numbers, or ranked by the filter or by a feature.

const CODE_COLUMNS = [
  { name: "Code", key: row => row.code, always: true },
  { name: "Rows", key: row => -row.count, text: row => integer(row.count), always: true },
  { name: "Share", key: row => -row.count, text: row => percent(row.share) },
  { name: "Distance", key: row => row.distance, text: row => number(row.distance), title: "Median distance of the latents to the code" },
  { name: "Effect", key: row => -row.effect, text: row => signed(row.effect), ranked: true, title: "Mean of the feature over the rows of the code, in standard deviations from the mean of all rows" },
  { name: "In filter", key: row => -row.inFilter, text: row => integer(row.inFilter), filtered: true, title: "Rows of the code that match the filter" },
  { name: "Share", key: row => -row.inFilter / row.count, text: row => percent(row.inFilter / row.count), filtered: true, title: "Share of the rows of the code that match the filter" },
  { name: "Overlap", key: row => -row.overlap, text: row => percent(row.overlap), filtered: true, title: "Rows with the code that match the filter, divided by the rows with either: 100 % if the code marks exactly these rows" },
];
const ROWS_AT_ONCE = 40; // more are added when the end of the table comes into view
let shownCodes = { rows: [], next: 0, unused: 0 };
let scrolled = false; // whether the table is scrolled: then as many rows as before are drawn again
let endObserver = null;
let sorting = { name: null, reverse: false, all: false };

const rankingFeature = () => (byId("feature").value === "" ? null : Number(byId("feature").value));

function shownColumns() {
  const filtered = state.filter.size > 0;
  const ranked = rankingFeature() !== null;
  return CODE_COLUMNS.filter(each => each.always || (each.ranked ? ranked : each.filtered ? filtered : !filtered && !ranked));
}

// The column that the user chose to sort by, if it is shown; else that of the last question asked.
function sortingColumn() {
  const shown = shownColumns();
  const byDefault = rankingFeature() !== null ? "Effect" : state.filter.size ? "Overlap" : "Code";
  return shown.find(each => each.name === sorting.name) ?? shown.find(each => each.name === byDefault);
}

// All codes with their rows in the filter, in the order of the codes.
function countedCodes() {
  return [...column("code/count")].map((count, code) => ({
    code, count, share: count / H.rows, inFilter: matchingCounts[code], overlap: matchingCounts[code] / (count + matches - matchingCounts[code]),
  }));
}

function codeRows() {
  const chosen = byId("codebook").value;
  const feature = rankingFeature();
  const rows = countedCodes().filter(({ code }) => chosen === "" || codebookOf(code) === Number(chosen)).map(row => ({
    ...row, distance: column("code/distance")[row.code], margin: column("code/margin")[row.code],
    effect: feature === null || slots[row.code] < 0 ? NaN : column("profile/effect")[slots[row.code] * H.features.length + feature],
  }));
  const { key } = sortingColumn();
  const sign = sorting.reverse ? -1 : 1;
  const last = value => (Number.isNaN(value) ? Infinity : value * sign);
  return rows.sort((a, b) => (last(key(a)) === last(key(b)) ? 0 : last(key(a)) - last(key(b))) || a.code - b.code);
}

const MOST_TIES = 3;

// The codes whose rows overlap most with those of a filter that has a condition; none if the filter has a code of their
// category, whose rows they share by construction.
function bestCodes() {
  if (![...state.filter.keys()].some(isCondition)) return [];
  const rows = countedCodes().filter(row => row.inFilter && !state.filter.has("tokens/" + codebookOf(row.code)));
  const most = rows.reduce((largest, row) => Math.max(largest, row.overlap), 0);
  const named = new Set(codesOf([...state.filter]).map(code => H.codebooks[codebookOf(code)].category));
  const best = rows.filter(row => row.overlap === most);
  return best.some(row => named.has(H.codebooks[codebookOf(row.code)].category)) ? [] : best;
}

function bestSentence([best, ...ties]) {
  const profile = ({ code }) => {
    const select = () => update({ selected: code, compared: null });
    return element("button", { type: "button", className: "code", textContent: codeLabel(code), title: "Show its profile", onclick: select });
  };
  const shares = `${percent(best.inFilter / matches)} of them have it, and ${percent(best.inFilter / best.count)} of its rows are among them. `;
  const others = ties.slice(0, MOST_TIES).flatMap((row, i) => [i ? ", " : " (and ", profile(row)]);
  if (ties.length > MOST_TIES) others.push(` and ${integer(ties.length - MOST_TIES)} more`);
  return ["The code that marks these rows best is ", profile(best), ...others, ties.length ? ", equally well): " : ": ", shares];
}

// The row of the filter that is nearest to a code of the filter, or to the code that marks the filter best.
function typicalRow(best) {
  const codes = codesOf([...state.filter]);
  const code = codes.includes(state.selected) ? state.selected : codes.at(-1) ?? best[0]?.code;
  const at = code === undefined || !state.filter.size ? undefined : exampleRows(code)[0]?.at;
  if (at === undefined) return [];
  const ranked = column("rank/" + codebookOf(code))[at] < H.rank_limit;
  const open = () => {
    pinRow(at);
    byId("row-panel").scrollIntoView();
  };
  const title = ranked ? `Show this row: of those that match the filter, the nearest to ${codeLabel(code)}` : "Show this row";
  const textContent = `${ranked ? "Most typical row" : "One of the rows, none of them typical"}: ${column("rows")[at]}`;
  return [element("button", { type: "button", className: "row", textContent, title, onclick: open })];
}

function showBest() {
  const best = bestCodes();
  const parts = matches ? [...(best.length ? bestSentence(best) : []), ...typicalRow(best)] : ["No row has all of these; remove one of them."];
  byId("best").hidden = !parts.length;
  byId("best").replaceChildren(...parts);
}

function headCell(each) {
  const isSorted = each === sortingColumn();
  const sort = () => {
    sorting = { ...sorting, name: each.name, reverse: isSorted && !sorting.reverse };
    showCodes();
  };
  const arrow = isSorted ? (sorting.reverse ? " ▴" : " ▾") : "";
  const button = element("button", { type: "button", textContent: each.name + arrow, title: each.title ?? "Sort", onclick: sort });
  return element("th", { scope: "col", "aria-sort": isSorted ? (sorting.reverse ? "descending" : "ascending") : "none" }, button);
}

function codeRow(row) {
  const className = "clickable" + (row.code === state.selected ? " current" : row.code === state.compared ? " second" : "");
  const name = element("button", { type: "button", textContent: codeLabel(row.code) });
  const cells = shownColumns().slice(1).map(each => element("td", { textContent: each.text(row) }));
  const select = () => update({ selected: row.code });
  return element("tr", { className, onclick: select, "data-code": row.code }, element("td", {}, name), ...cells);
}

// The next rows of the table, and what follows the last one.
function nextCodes(count) {
  const { rows, next, unused } = shownCodes;
  shownCodes.next = Math.min(rows.length, next + count);
  const body = rows.slice(next, shownCodes.next).map(codeRow);
  if (shownCodes.next < rows.length || !unused) return body;
  const more = () => {
    sorting.all = true;
    showCodes();
  };
  const text = `Show all codes, also ${integer(unused)} without a row`;
  const button = element("button", { type: "button", textContent: text, onclick: more });
  return [...body, element("tr", {}, element("td", { colSpan: shownColumns().length }, button))];
}

function watchEnd() {
  endObserver.disconnect();
  if (shownCodes.next < shownCodes.rows.length) endObserver.observe(byId("codes").tBodies[0].lastChild);
}

function addCodes(entries) {
  if (!entries.some(entry => entry.isIntersecting)) return;
  byId("codes").tBodies[0].append(...nextCodes(ROWS_AT_ONCE));
  watchEnd();
}

function showCodes() {
  const shown = shownColumns();
  const every = codeRows();
  const used = every.filter(row => row.count || row.code === state.selected || row.code === state.compared);
  const rows = sorting.all ? every : used;
  const count = scrolled ? Math.max(ROWS_AT_ONCE, shownCodes.next) : ROWS_AT_ONCE;
  shownCodes = { rows, next: 0, unused: every.length - rows.length };
  const body = nextCodes(count);
  const focused = document.activeElement.closest("#codes tbody") !== null;
  byId("codes").replaceChildren(element("thead", {}, element("tr", {}, ...shown.map(headCell))), element("tbody", {}, ...body));
  watchEnd();
  if (focused) document.querySelector("#codes tr.current button")?.focus({ preventScroll: true });
}

function startCodes() {
  const select = byId("codebook");
  select.append(element("option", { value: "", textContent: "all" }));
  H.codebooks.forEach((book, g) => {
    const name = H.categories[book.category].name;
    select.append(element("option", { value: String(g), textContent: `${codebookLabel(g)} (${name}, ${book.codes} codes)` }));
  });
  const features = byId("feature");
  const options = H.features.map((each, f) => [each.name, f]).sort((a, b) => NAMES.compare(a[0], b[0]));
  features.append(element("option", { value: "", textContent: "none" }), ...options.map(([textContent, f]) => element("option", { value: String(f), textContent })));
  select.onchange = showCodes;
  features.onchange = () => {
    sorting = { ...sorting, name: null, reverse: false };
    showCodes();
  };
  addCsvButton(document.querySelector("#codes-panel h2"), "codes", () => [
    ["codebook", "code", "rows", "share", "distance_median", "margin_median", "rows_in_filter"],
    ...codeRows().map(row => {
      const g = codebookOf(row.code);
      return [codebookLabel(g), row.code - offsets[g], row.count, row.share, row.distance, row.margin, row.inFilter];
    }),
  ]);
  const root = byId("codes").parentElement;
  endObserver = new IntersectionObserver(addCodes, { root, rootMargin: "300px" });
  root.addEventListener("scroll", () => (scrolled = root.scrollTop > 0));
  onChange(showCodes);
  onChange(showBest);
}
