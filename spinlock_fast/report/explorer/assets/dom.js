// Elements, numbers as text, and CSV files. All texts are set as text, never as HTML.

const byId = id => document.getElementById(id);

function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties))
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const INTEGERS = new Intl.NumberFormat("en-US"); // made once: toLocaleString makes one for each call
const integer = value => INTEGERS.format(value);
const NAMES = new Intl.Collator("en", { numeric: true });
const percent = value => (Number.isNaN(value) ? "–" : (100 * value).toFixed(value < 0.0995 ? 2 : 1) + " %");

function number(value, digits = 2) {
  if (Number.isNaN(value)) return "–";
  return Number.isFinite(value) ? value.toFixed(digits) : "∞";
}

// Three significant digits.
const short = value => String(+value.toPrecision(3)).replace("-", "−");

const counted = (value, one, many = one + "s") => `${integer(value)} ${value === 1 ? one : many}`;

// A long name, which may be broken after "_", ":" and "/".
function breakable(text) {
  const parts = text.split(/(?<=[_:/])(?![_:/])/);
  return parts.flatMap((part, i) => (i ? [element("wbr"), part] : [part]));
}

function signed(value) {
  const text = number(value);
  return value > 0 && !/^0\.0*$/.test(text) ? "+" + text : text.replace(/^-0\.00$/, "0.00").replace("-", "−");
}

function csvField(value) {
  if (typeof value === "number") return Number.isFinite(value) ? String(+value.toPrecision(6)) : "";
  let text = String(value);
  if (/^[=+\-@]/.test(text)) text = "'" + text; // a spreadsheet would evaluate it
  return /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
}

function csvText(rows) {
  return rows.map(row => row.map(csvField).join(",")).join("\n") + "\n";
}

function saveCsv(name, rows) {
  const link = element("a", { href: URL.createObjectURL(new Blob([csvText(rows)], { type: "text/csv" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Adds a CSV button to a panel; `rows` returns the rows, the first of them the names of the columns.
function addCsvButton(where, name, rows) {
  where.append(element("button", { type: "button", onclick: () => saveCsv(name + ".csv", rows()), textContent: "CSV" }));
}

function tableHead(names) {
  return element("thead", {}, element("tr", {}, ...names.map(name => element("th", { scope: "col" }, ...breakable(name)))));
}
