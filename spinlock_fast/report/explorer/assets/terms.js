// Terms of the filter as text: "c3=12/4/7" for codes, "noise_regime=large" for a condition. In the filter, a term is the
// name of a column and its value: ["tokens/4", 12] or ["condition/0", 1].

const codeTerm = code => ["tokens/" + codebookOf(code), code - offsets[codebookOf(code)]];

// The codes among terms, in their order.
const codesOf = terms => terms.flatMap(([key, value]) => (key.startsWith("tokens/") ? [offsets[Number(key.slice(7))] + value] : []));

const isCondition = key => key.startsWith("condition/");

const levelOf = (c, at) => H.conditions[c].levels[column("condition/" + c)[at]];

// Each text as one word that the search box and the address can hold; equal words are numbered.
function words(texts) {
  const seen = new Map();
  return texts.map(text => {
    const word = text.replace(/[^\p{L}\p{N}.-]+/gu, "_").replace(/^_+|_+$/g, "") || "_";
    const times = (seen.get(word) ?? 0) + 1;
    seen.set(word, times);
    return times > 1 ? `${word}~${times}` : word;
  });
}

// The words of the conditions, none of them that of a category.
function conditionWords() {
  const taken = new Set(H.categories.flatMap(each => [each.name, each.short]));
  return words(H.conditions.map(each => each.name)).map(word => (taken.has(word) ? word + "~" : word));
}

function parseCondition(name, value) {
  const conditions = conditionWords();
  const c = conditions.findIndex(word => word.toLowerCase() === words([name])[0].toLowerCase() || word === name);
  if (c < 0) return null;
  const levels = words(H.conditions[c].levels);
  const level = levels.findIndex(word => word.toLowerCase() === value.toLowerCase());
  if (level < 0) throw new Error(`${name}=${value}: ${conditions[c]} is one of ${levels.slice(0, 8).join(", ")}${levels.length > 8 ? ", ..." : ""}`);
  return ["condition/" + c, level];
}

// The codes of a category from coarse to fine, * for any; also by the full name of a category, or "name/L1=4".
function parseTerm(text) {
  const equals = text.lastIndexOf("=");
  const name = text.slice(0, equals).trim();
  const known = H.categories.map(category => category.short);
  if (equals < 1) throw new Error(`${text}: write ${known[0]}=12 or ${known[0]}=12/4/7`);
  const [, base, level] = name.match(/^(.*?)(?:\/L(\d+))?$/);
  let category = H.categories.findIndex(each => each.name === base || each.name === name);
  if (category < 0) category = known.indexOf(base);
  if (category < 0) {
    const found = parseCondition(name, text.slice(equals + 1).trim());
    if (found) return [found];
    throw new Error(`${name}: no such category or condition; categories are ${known[0]} to ${known.at(-1)}`);
  }
  const books = codebooksOf(category);
  const first = level !== undefined && H.categories[category].name !== name ? Number(level) : 0;
  return text.slice(equals + 1).trim().split("/").flatMap((part, i) => {
    const g = books[first + i];
    if (g === undefined) throw new Error(`${text}: ${known[category]} has ${books.length} levels`);
    if (part === "*") return [];
    if (!/^\d+$/.test(part) || Number(part) >= H.codebooks[g].codes)
      throw new Error(`${text}: ${codebookLabel(g)} has codes 0 to ${H.codebooks[g].codes - 1}`);
    return [["tokens/" + g, Number(part)]];
  });
}

const parseFilter = text => text.split(/[\s,;]+/).filter(Boolean).flatMap(parseTerm);

// "c2=4 vs c2=9", or "c2=4 vs 9" for two codes of one codebook.
function parseComparison(first, second) {
  const one = codesOf(parseFilter(first)).at(-1);
  if (one === undefined) throw new Error(`${first}: write ${searchExample()}`);
  const other = /^\s*\d+\s*$/.test(second) ? `${termOf(one).replace(/\d+$/, "")}${second.trim()}` : second;
  const two = codesOf(parseFilter(other)).at(-1);
  if (two === undefined || one === two) throw new Error(`${second}: write ${searchExample()}`);
  return { selected: one, compared: two };
}

function termOf(code) {
  const g = codebookOf(code);
  const book = H.codebooks[g];
  return H.categories[book.category].short + "=" + "*/".repeat(book.level) + (code - offsets[g]);
}

function termLabel(key, value) {
  const number = Number(key.split("/")[1]);
  if (isCondition(key)) return `${H.conditions[number].name}: ${H.conditions[number].levels[value]}`;
  return codeLabel(offsets[number] + value);
}

// The filter as text, one term for each category and condition.
function filterText() {
  const ofCategories = H.categories.flatMap((category, c) => {
    const parts = codebooksOf(c).map(g => state.filter.get("tokens/" + g) ?? "*");
    while (parts.at(-1) === "*") parts.pop();
    return parts.length ? [category.short + "=" + parts.join("/")] : [];
  });
  const names = conditionWords();
  const ofConditions = H.conditions.flatMap(({ levels }, c) => {
    const level = state.filter.get("condition/" + c);
    return level === undefined ? [] : [names[c] + "=" + words(levels)[level]];
  });
  return [...ofCategories, ...ofConditions].join(" ");
}

const searchExample = () => `${H.categories[0].short}=2, or ${H.categories[0].short}=2 vs ${H.categories[0].short}=3`;

function searchHelp() {
  const example = H.categories[0].short;
  const deep = codebooksOf(0).length > 1 ? `; ${example}=2/1 is L0 = 2 and L1 = 1; ${example}=*/1 is L1 = 1` : "";
  return `${example}=2 is code 2 of level L0${deep}. Several, separated by spaces, must all match. Keys: / to search, Esc to clear.`;
}
