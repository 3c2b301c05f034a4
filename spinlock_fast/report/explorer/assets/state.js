// What the user has chosen: filter, selected code, compared code. Kept in the URL's hash.

// filter: name of a column -> value, see terms.js; unchosen: the selected code was opened with the page
const state = { filter: new Map(), selected: 0, compared: null, unchosen: false };
let matching = new Uint8Array(0); // [rows] 1 where a row has all values of the filter
let matches = 0;
let matchingCounts = new Uint32Array(0); // [codes] number of those rows with each code
const listeners = [];

const onChange = listener => listeners.push(listener);

// [rows] 1 where a row has all values of a filter.
function match(filter) {
  const found = new Uint8Array(H.rows).fill(1);
  for (const [key, value] of filter) {
    const own = column(key);
    for (let i = 0; i < found.length; i++) found[i] &= own[i] === value;
  }
  return found;
}

// The indices of the rows with this value.
function rowsWith(found, value) {
  const rows = new Uint32Array(found.length);
  let count = 0;
  for (let i = 0; i < found.length; i++) if (found[i] === value) rows[count++] = i;
  return rows.subarray(0, count);
}

// [codes] number of the given rows with each code. Counts the rows or the others, whichever are fewer: with 120 codebooks,
// a pass over all tokens of 100,000 rows takes longer than the rest of an update.
function countCodes(found, number) {
  const few = 2 * number <= found.length;
  const rows = rowsWith(found, few ? 1 : 0);
  const counts = new Uint32Array(offsets.at(-1));
  tokens.forEach((own, g) => {
    const first = offsets[g];
    for (let i = 0; i < rows.length; i++) counts[first + own[rows[i]]]++;
  });
  return few ? counts : column("code/count").map((all, code) => all - counts[code]);
}

function update(change = {}) {
  const began = performance.now();
  Object.assign(state, { unchosen: state.unchosen && !("selected" in change) }, change);
  if ("filter" in change) {
    matching = match(state.filter);
    matches = matching.reduce((sum, value) => sum + value, 0);
    matchingCounts = countCodes(matching, matches);
  }
  const filtered = performance.now();
  showAddress(); // before the panels change: it computes the style of the page
  for (const listener of listeners) listener();
  Object.assign(document.documentElement.dataset, {
    matches, filterMs: (filtered - began).toFixed(1), updateMs: (performance.now() - began).toFixed(1),
  });
}

function showAddress() {
  const parameters = [["f", filterText()], ["s", termOf(state.selected)]];
  if (state.compared !== null) parameters.push(["v", termOf(state.compared)]);
  const hash = parameters.filter(([, text]) => text).map(([key, text]) => key + "=" + text.replaceAll(" ", "+")).join("&");
  history.replaceState(null, "", "#" + hash);
}

function readHash() {
  const change = { filter: new Map(), compared: null };
  for (const encoded of location.hash.slice(1).split("&")) {
    try {
      const part = decodeURIComponent(encoded);
      const terms = parseFilter(part.slice(2).replaceAll("+", " "));
      if (part.startsWith("f=")) change.filter = new Map(terms);
      else if (part.startsWith("s=") && codesOf(terms).length) change.selected = codesOf(terms)[0];
      else if (part.startsWith("v=") && codesOf(terms).length) change.compared = codesOf(terms)[0];
    } catch (error) {
      byId("search-error").textContent = error.message;
    }
  }
  return change;
}

function addToFilter(terms, change = {}) {
  update({ ...change, filter: new Map([...state.filter, ...terms]) });
}

function showFilter() {
  byId("matches").textContent = `${integer(matches)} of ${integer(H.rows)} rows`;
  const chips = [...state.filter].map(([key, value]) => {
    const remove = () => update({ filter: new Map([...state.filter].filter(([other]) => other !== key)) });
    return element("button", { type: "button", className: "chip", textContent: `${termLabel(key, value)} ×`, title: "Remove from the filter", onclick: remove });
  });
  byId("chips").replaceChildren(...chips);
  byId("clear").hidden = !chips.length;
}

function matchingRows() {
  const names = H.codebooks.map(book => H.categories[book.category].name + "/L" + book.level);
  const rows = [["row", ...names, ...H.conditions.map(each => each.name)]];
  for (let i = 0; i < H.rows; i++)
    if (matching[i]) rows.push([column("rows")[i], ...tokens.map(own => own[i]), ...H.conditions.map((_, c) => levelOf(c, i))]);
  return rows;
}

function clearFilter() {
  byId("search-error").textContent = "";
  byId("search").value = "";
  update({ filter: new Map() });
}

function search() {
  const box = byId("search");
  try {
    const sides = box.value.split(/\s+vs\.?\s+/i);
    if (sides.length === 2) update(parseComparison(...sides));
    else {
      const terms = parseFilter(box.value);
      const codes = codesOf(terms);
      if (terms.length) addToFilter(terms, codes.length ? { selected: codes.at(-1), compared: null } : {});
    }
    byId("search-error").textContent = "";
    box.value = "";
  } catch (error) {
    byId("search-error").textContent = error.message;
  }
}

// [levels] number of rows with each value of a condition; kept, as it is asked for at each update.
const countsOfLevels = [];
function levelCounts(c) {
  if (!countsOfLevels[c]) {
    countsOfLevels[c] = new Uint32Array(H.conditions[c].levels.length);
    for (const level of column("condition/" + c)) countsOfLevels[c][level]++;
  }
  return countsOfLevels[c];
}

// One list of all values of all conditions; a choice is added to the filter.
function fillConditions(select) {
  const groups = H.conditions.map(({ name, levels }, c) => {
    const counts = levelCounts(c);
    const options = levels.map((level, i) => element("option", { value: `${c}/${i}`, textContent: `${name}: ${level} (${integer(counts[i])})` }));
    return element("optgroup", { label: name }, ...options);
  });
  select.append(element("option", { value: "", textContent: "choose a value" }), ...groups);
  select.onchange = () => {
    const [c, level] = select.value.split("/");
    select.value = "";
    addToFilter([["condition/" + c, Number(level)]]);
  };
}

function startFilter() {
  byId("search").placeholder = searchExample();
  byId("search-help").textContent = searchHelp();
  byId("condition-label").hidden = !H.conditions.length;
  fillConditions(byId("condition"));
  byId("search-form").addEventListener("submit", event => {
    event.preventDefault();
    search();
  });
  byId("clear").onclick = clearFilter;
  byId("link").onclick = async () => {
    const done = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
    byId("link").textContent = done ? "Copied" : "Copy the address of the page";
    setTimeout(() => (byId("link").textContent = "Copy link"), 2000);
  };
  byId("rows-csv").onclick = () => saveCsv("rows.csv", matchingRows());
  document.addEventListener("keydown", event => {
    if (event.key === "/" && !event.ctrlKey && !event.metaKey && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
      event.preventDefault();
      byId("search").focus();
    } else if (event.key === "Escape") clearFilter();
  });
  window.addEventListener("hashchange", () => update(readHash()));
  onChange(showFilter);
}
