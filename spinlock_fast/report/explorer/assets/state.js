// What the user has chosen: filter (codebook -> number of the code), selected code, compared code. Kept in the URL's hash.

const state = { filter: new Map(), selected: 0, compared: null };
let matching = new Uint8Array(0); // [rows] 1 where a row has all codes of the filter
let matches = 0;
const listeners = [];

const onChange = listener => listeners.push(listener);

// "c3=12/4/7": the codes of a category from coarse to fine, * for any; also the full name of a category or "name/L1=4".
function parseTerm(text) {
  const equals = text.lastIndexOf("=");
  const name = text.slice(0, equals).trim();
  const known = H.categories.map(category => category.short);
  if (equals < 1) throw new Error(`${text}: write ${known[0]}=12 or ${known[0]}=12/4/7`);
  const [, base, level] = name.match(/^(.*?)(?:\/L(\d+))?$/);
  let category = H.categories.findIndex(each => each.name === base || each.name === name);
  if (category < 0) category = known.indexOf(base);
  if (category < 0) throw new Error(`${name}: no such category; they are ${known[0]} to ${known.at(-1)}`);
  const books = codebooksOf(category);
  const first = level !== undefined && H.categories[category].name !== name ? Number(level) : 0;
  return text.slice(equals + 1).trim().split("/").flatMap((part, i) => {
    const g = books[first + i];
    if (g === undefined) throw new Error(`${text}: ${known[category]} has ${books.length} levels`);
    if (part === "*") return [];
    if (!/^\d+$/.test(part) || Number(part) >= H.codebooks[g].codes)
      throw new Error(`${text}: ${codebookLabel(g)} has codes 0 to ${H.codebooks[g].codes - 1}`);
    return [[g, Number(part)]];
  });
}

const parseFilter = text => text.split(/[\s,;]+/).filter(Boolean).flatMap(parseTerm);

function termOf(code) {
  const g = codebookOf(code);
  const book = H.codebooks[g];
  return H.categories[book.category].short + "=" + "*/".repeat(book.level) + (code - offsets[g]);
}

// The filter as text, one term for each category.
function filterText() {
  return H.categories.flatMap((category, c) => {
    const parts = codebooksOf(c).map(g => state.filter.get(g) ?? "*");
    while (parts.at(-1) === "*") parts.pop();
    return parts.length ? [category.short + "=" + parts.join("/")] : [];
  }).join(" ");
}

// [rows] 1 where a row has all codes of a filter.
function match(filter) {
  const found = new Uint8Array(H.rows).fill(1);
  for (const [g, code] of filter) {
    const own = tokens[g];
    for (let i = 0; i < found.length; i++) found[i] &= own[i] === code;
  }
  return found;
}

// [codes] number of the given rows with each code.
function countCodes(found) {
  const counts = new Uint32Array(offsets.at(-1));
  tokens.forEach((own, g) => {
    const first = offsets[g];
    for (let i = 0; i < found.length; i++) counts[first + own[i]] += found[i];
  });
  return counts;
}

function update(change = {}) {
  const began = performance.now();
  Object.assign(state, change);
  matching = match(state.filter);
  matches = matching.reduce((sum, value) => sum + value, 0);
  const filtered = performance.now();
  for (const listener of listeners) listener();
  const parameters = [["f", filterText()], ["s", termOf(state.selected)]];
  if (state.compared !== null) parameters.push(["v", termOf(state.compared)]);
  const hash = parameters.filter(([, text]) => text).map(([key, text]) => key + "=" + text.replaceAll(" ", "+")).join("&");
  history.replaceState(null, "", "#" + hash);
  Object.assign(document.documentElement.dataset, {
    matches, filterMs: (filtered - began).toFixed(1), updateMs: (performance.now() - began).toFixed(1),
  });
}

function readHash() {
  const change = { filter: new Map(), compared: null };
  for (const encoded of location.hash.slice(1).split("&")) {
    try {
      const part = decodeURIComponent(encoded);
      const text = part.slice(2).replaceAll("+", " ");
      const terms = parseFilter(text);
      const [code] = terms.map(([g, own]) => offsets[g] + own);
      if (part.startsWith("f=")) change.filter = new Map(terms);
      else if (part.startsWith("s=") && terms.length) change.selected = code;
      else if (part.startsWith("v=") && terms.length) change.compared = code;
    } catch (error) {
      byId("search-error").textContent = error.message;
    }
  }
  return change;
}

function addToFilter(...codes) {
  const filter = new Map(state.filter);
  for (const code of codes) filter.set(codebookOf(code), code - offsets[codebookOf(code)]);
  update({ filter });
}

function showFilter() {
  byId("matches").textContent = `${integer(matches)} of ${integer(H.rows)} rows`;
  const chips = [...state.filter].map(([g, code]) => {
    const label = codeLabel(offsets[g] + code);
    const remove = () => {
      const filter = new Map(state.filter);
      filter.delete(g);
      update({ filter });
    };
    return element("button", { type: "button", className: "chip", textContent: label + " ×", title: "Remove from the filter", onclick: remove });
  });
  byId("chips").replaceChildren(...chips);
  byId("clear").hidden = !chips.length;
}

function matchingRows() {
  const rows = [["row", ...H.codebooks.map((book) => H.categories[book.category].name + "/L" + book.level)]];
  for (let i = 0; i < H.rows; i++) if (matching[i]) rows.push([column("rows")[i], ...tokens.map(own => own[i])]);
  return rows;
}

function clearFilter() {
  byId("search-error").textContent = "";
  byId("search").value = "";
  update({ filter: new Map() });
}

function startFilter() {
  const search = byId("search");
  const example = H.categories[0].short;
  const isDeep = codebooksOf(0).length > 1;
  search.placeholder = isDeep ? `${example}=2 or ${example}=2/1` : `${example}=2`;
  byId("search-help").textContent =
    `${example}=2 is code 2 of level L0` +
    (isDeep ? `; ${example}=2/1 is L0 = 2 and L1 = 1; ${example}=*/1 is L1 = 1. ` : ". ") +
    "Several, separated by spaces, must all match. Keys: / to search, Esc to clear.";
  byId("search-form").addEventListener("submit", event => {
    event.preventDefault();
    try {
      const terms = parseFilter(search.value);
      byId("search-error").textContent = "";
      search.value = "";
      if (terms.length) addToFilter(...terms.map(([g, code]) => offsets[g] + code));
    } catch (error) {
      byId("search-error").textContent = error.message;
    }
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
      search.focus();
    } else if (event.key === "Escape") clearFilter();
  });
  window.addEventListener("hashchange", () => update(readHash()));
  onChange(showFilter);
}
