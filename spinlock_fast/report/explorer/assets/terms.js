// Terms of the filter as text: "c3=12/4/7" for codes, "noise_regime=large" or "noise regime: large" for a condition. In the
// filter, a term is the name of a column and its value: ["tokens/4", 12] or ["condition/0", 1].

const codeTerm = code => ["tokens/" + codebookOf(code), code - offsets[codebookOf(code)]];

// The codes among terms, in their order.
const codesOf = terms => terms.flatMap(([key, value]) => (key.startsWith("tokens/") ? [offsets[Number(key.slice(7))] + value] : []));

const isCondition = key => key.startsWith("condition/");

const levelOf = (c, at) => H.conditions[c].levels[column("condition/" + c)[at]];

const asWord = text => text.replace(/[^\p{L}\p{N}.-]+/gu, "_").replace(/^_+|_+$/g, "") || "_";

// Each text as one word that the search box and the address can hold; equal words are numbered.
function words(texts) {
  const seen = new Map();
  return texts.map(text => {
    const word = asWord(text);
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

const listed = texts => texts.slice(0, 8).join(", ") + (texts.length > 8 ? ", ..." : "");

function parseCondition(name, value) {
  const conditions = conditionWords();
  const c = conditions.findIndex(word => word.toLowerCase() === asWord(name).toLowerCase() || word === name);
  if (c < 0) return null;
  const levels = words(H.conditions[c].levels);
  const level = levels.findIndex(word => word.toLowerCase() === value.toLowerCase());
  if (level < 0) throw new Error(`${name}=${value}: ${conditions[c]} is one of ${listed(levels)}`);
  return ["condition/" + c, level];
}

// The values of conditions that a text names, as the list of conditions shows them: by the whole text or the value alone,
// else by the words of the whole text, else by words in it, else by the beginning of a word in it. Case is ignored.
function conditionsNamed(text) {
  const plain = shown => shown.trim().replace(/\s+/g, " ").toLowerCase();
  const written = plain(text);
  const word = "_" + asWord(written);
  if (/^[_\d.-]*$/.test(word)) return []; // a number alone may be a code
  const all = H.conditions.flatMap(({ name, levels }, c) => levels.map((level, i) => {
    const shown = plain(`${name}: ${level}`);
    return { c, i, texts: [shown, plain(level)], word: `_${asWord(shown)}_` };
  }));
  const tests = [
    each => each.texts.includes(written),
    each => each.word === word + "_",
    each => each.word.includes(word + "_"),
    each => /^_.{2,}[^\d.]$/.test(word) && each.word.includes(word), // not 0.2 for 0.25
  ];
  return tests.map(test => all.filter(test)).find(found => found.length) ?? [];
}

const conditionValues = c => {
  const { name, levels } = H.conditions[c];
  return `${name} is one of ${listed(levels)}; write ${name}: ${levels.at(-1)}, or choose it under Condition`;
};

// The condition that the longest run of the pieces from the first one names, and the number of those pieces; null if none.
function readCondition(pieces, text) {
  for (let count = pieces.length; count > 0; count--) {
    const [start, last] = [pieces[0].index, pieces[count - 1]];
    const part = text.slice(start, last.index + last[0].length);
    const found = conditionsNamed(part);
    if (found.length === 1) return { term: ["condition/" + found[0].c, found[0].i], count };
    if (!found.length) continue;
    if (found.some(each => each.c !== found[0].c)) throw new Error(`${part}: several conditions have this; choose one under Condition`);
    throw new Error(`${part.replace(/:$/, "")}: ${conditionValues(found[0].c)}`);
  }
  return null;
}

const isCategory = name => H.categories.some(each => [each.name, each.short].includes(name.replace(/\/L\d+$/, "")) || each.name === name);

// The codes of a category from coarse to fine, * for any; also by the full name of a category, or "name/L1=4".
function parseTerm(text) {
  const equals = text.lastIndexOf("=");
  const name = text.slice(0, equals).trim();
  const known = H.categories.map(category => category.short);
  if (equals < 1) throw new Error(`${text}: write ${known[0]}=12 or ${known[0]}=12/4/7` + (H.conditions.length ? "; choose conditions under Condition" : ""));
  const [, base, level] = name.match(/^(.*?)(?:\/L(\d+))?$/);
  let category = H.categories.findIndex(each => each.name === base || each.name === name);
  if (category < 0) category = known.indexOf(base);
  if (category < 0) {
    const found = parseCondition(name, text.slice(equals + 1).trim());
    if (found) return [found];
    const named = conditionsNamed(name);
    if (new Set(named.map(each => each.c)).size === 1) throw new Error(`${text}: ${conditionValues(named[0].c)}`);
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

// All terms of a text. A piece of it is one term, or several pieces are the name of a condition.
function parseTerms(text) {
  const pieces = [...text.matchAll(/[^\s,;]+/g)];
  const terms = [];
  for (let i = 0; i < pieces.length; ) {
    const [piece] = pieces[i];
    const equals = piece.lastIndexOf("=");
    const name = piece.slice(0, Math.max(0, equals));
    const isWord = equals > 0 && conditionWords().includes(name);
    const found = isCategory(name) || isWord ? null : readCondition(pieces.slice(i), text);
    terms.push(...(found ? [found.term] : parseTerm(piece)));
    i += found?.count ?? 1;
  }
  return terms;
}

// The terms of a text, which has at most one for each codebook and condition.
function parseFilter(text) {
  const terms = parseTerms(text);
  const values = new Map();
  for (const [key, value] of terms) {
    const other = values.get(key) ?? value;
    values.set(key, other);
    if (other === value) continue;
    const g = Number(key.split("/")[1]);
    if (isCondition(key)) throw new Error(`${H.conditions[g].name} can have one value here: choose ${H.conditions[g].levels[other]} or ${H.conditions[g].levels[value]}`);
    const book = H.codebooks[g];
    const name = book.level ? codebookLabel(g) : H.categories[book.category].short;
    throw new Error(`${name} can have one code here: write ${termOf(offsets[g] + other)} vs ${value} to compare`);
  }
  return terms;
}

// "c2=4 vs c2=9", or "c2=4 vs 9" for two codes of one codebook.
function parseComparison(first, second) {
  const codeOf = text => {
    const terms = parseFilter(text);
    if (codesOf(terms).length !== 1 || terms.length !== 1) throw new Error(`${text.trim()}: a comparison has one code on each side: write ${comparisonExample()}`);
    return codesOf(terms)[0];
  };
  const one = codeOf(first);
  const two = codeOf(/^\s*\d+\s*$/.test(second) ? `${termOf(one).replace(/\d+$/, "")}${second.trim()}` : second);
  if (one === two) throw new Error(`${second}: the same code on both sides: write ${comparisonExample()}`);
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

const comparisonExample = () => `${H.categories[0].short}=2 vs ${H.categories[0].short}=3`;
const searchExample = () => `${H.categories[0].short}=2, or ${comparisonExample()}`;

function searchHelp() {
  const example = H.categories[0].short;
  const deep = codebooksOf(0).length > 1 ? `; ${example}=2/1 is L0 = 2 and L1 = 1; ${example}=*/1 is L1 = 1` : "";
  const condition = exampleCondition();
  const conditions = condition ? ` So is a condition, such as ${condition}.` : "";
  const once = `one for each codebook${condition ? " and condition" : ""}; a later search replaces it`;
  return `${example}=2 is code 2 of level L0${deep}.${conditions} Several, separated by spaces, must all match: ${once}. Keys: / to search, Esc to clear.`;
}
