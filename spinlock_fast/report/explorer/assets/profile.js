// The profile of the selected code: effects of features and lifts of conditions, with 95 % intervals, as computed by
// spinlock_fast.analysis. The difference of two codes is the difference of their effects.

const TOP = 12;

// Distance of an interval from a value, with the sign of the side; 0 for an interval that contains it.
const clearance = (low, high, from) => (low > from ? low - from : high < from ? high - from : 0);

function effectsOf(code) {
  const slot = slots[code];
  if (slot < 0) return [];
  const F = H.features.length;
  return H.features.map((feature, f) => {
    const i = slot * F + f;
    return {
      f, name: feature.name, kind: feature.kind, effect: column("profile/effect")[i],
      half: column("profile/half_width")[i], auc: column("profile/auc")[i], found: column("profile/found")[i] === 1,
    };
  });
}

function profileRows() {
  const own = effectsOf(state.selected);
  const other = state.compared === null ? null : effectsOf(state.compared);
  if (other !== null && (!own.length || !other.length)) return [];
  const rows = own.map((each, f) => {
    const value = other ? each.effect - other[f].effect : each.effect;
    const half = other ? Math.hypot(each.half, other[f].half) : each.half;
    const rank = Number.isNaN(half) ? 0 : Math.abs(clearance(value - half, value + half, 0));
    return { ...each, other: other?.[f], value, spread: half, rank };
  });
  const size = row => (Number.isNaN(row.value) ? -1 : Math.abs(row.value));
  return rows.sort((a, b) => b.rank - a.rank || size(b) - size(a) || a.f - b.f);
}

function dotPlot(marks, scale, zero) {
  const plot = svg("svg", { viewBox: "0 0 300 22", preserveAspectRatio: "none", "aria-hidden": "true" });
  plot.append(svg("line", { class: "zero", x1: scale(zero), x2: scale(zero), y1: 0, y2: 22 }));
  for (const { low, high, at, className, y } of marks) {
    if (Number.isFinite(low) && Number.isFinite(high))
      plot.append(svg("line", { class: className, x1: scale(low), x2: scale(high), y1: y, y2: y }));
    plot.append(svg("rect", { class: className, x: scale(at) - 2, y: y - 4, width: 4, height: 8, stroke: "none" }));
  }
  return plot;
}

// The labels of the left end, the middle and the right end of the plots above.
function axis(...labels) {
  const texts = labels.map(text => element("span", { textContent: text }));
  return [element("div", { className: "name axis" }), element("div", { className: "axis muted" }, ...texts), element("div", { className: "axis" })];
}

const plotClass = () => (state.compared === null ? "plot" : "plot pairs");

const interval = (low, high, digits = 2) =>
  Number.isFinite(low) && Number.isFinite(high) ? ` [${number(low, digits)}, ${number(high, digits)}]`.replaceAll("-", "−") : "";

// The three largest differences in words: the largest first, and after "also" those of less than half its size.
function summary(rows) {
  const clear = rows.filter(row => row.rank > 0 && (row.other || row.found)).sort((a, b) => Math.abs(b.value) - Math.abs(a.value)).slice(0, 3);
  const rest = state.compared === null ? "all rows" : `those with ${codeLabel(state.compared)}`;
  const subject = `Rows with ${codeLabel(state.selected)}`;
  if (!clear.length) return `${subject} do not differ clearly from ${rest} in any feature.`;
  const isLarge = row => 2 * Math.abs(row.value) >= Math.abs(clear[0].value);
  const texts = which => clear.filter(which).map(row => `${row.value > 0 ? "higher" : "lower"} ${row.name} (by ${number(Math.abs(row.value))} SD)`);
  const also = texts(row => !isLarge(row));
  return `${subject} have ${texts(isLarge).join(", ")} than ${rest}${also.length ? `; also ${also.join(", ")}` : ""}.`;
}

// Which rows the profile describes where that may be mistaken, and why a code is shown that nobody has chosen.
function profileNote() {
  const parts = [];
  if (state.unchosen) parts.push("Opened first: of the codes with at least 2 % of the rows, the one that differs most clearly from all rows in a feature.");
  if (state.filter.size) {
    const counts = [state.selected, state.compared].filter(code => code !== null).map(code => integer(column("code/count")[code]));
    const rows = counts.length > 1 ? `${counts.join(" and ")} rows of the two codes` : `${counts[0]} rows of the code`;
    parts.push(`Describes all ${rows}, whatever the filter: it is not applied here.`);
  }
  return parts.join(" ");
}

function showProfile() {
  byId("selected").replaceChildren(element("span", { className: "key-one", textContent: codeLabel(state.selected) }));
  if (state.compared !== null)
    byId("selected").append(" compared with ", element("span", { className: "key-two", textContent: codeLabel(state.compared) }));
  byId("profile-note").textContent = profileNote();
  byId("profile-help").textContent = state.compared === null
    ? "Mean of the feature over the rows of the code, in standard deviations from the mean of all rows, with its 95 % interval. " +
      `The ${TOP} whose interval is farthest from 0; muted: not significant at a false discovery rate of ${H.alpha}.`
    : "Both effects, and as the number their difference with its 95 % interval, which treats the rows of the two codes as independent. " +
      "The largest differences first; muted: the interval contains 0.";
  const rows = profileRows().filter(row => !Number.isNaN(row.value)).slice(0, TOP);
  byId("summary").hidden = !rows.length;
  byId("summary").textContent = summary(rows);
  if (!rows.length) {
    byId("profile").replaceChildren(element("p", { className: "muted", textContent: "No row has this code." }));
    return;
  }
  const ends = rows.flatMap(row => [row, row.other].filter(Boolean).flatMap(e => [e.effect, e.effect - e.half, e.effect + e.half]));
  const reach = Math.max(0.5, ...ends.filter(Number.isFinite).map(Math.abs));
  const scale = value => 150 + (Math.max(-reach, Math.min(reach, value)) / reach) * 146;
  const cells = rows.flatMap(row => {
    const mark = (each, className, y) => ({ low: each.effect - each.half, high: each.effect + each.half, at: each.effect, className, y });
    const marks = row.other ? [mark(row, "one", 7), mark(row.other, "two", 15)] : [mark(row, "one", 11)];
    const title = `${row.kind} feature; AUC ${number(row.auc, 3)}`;
    const muted = (row.other ? row.rank > 0 : row.found) ? "" : " muted";
    return [
      element("div", { className: "name" + muted, title }, ...breakable(row.name)),
      dotPlot(marks, scale, 0),
      element("div", { className: "value" + muted, textContent: signed(row.value) + interval(row.value - row.spread, row.value + row.spread) }),
    ];
  });
  cells.push(...axis(signed(-reach), "0", signed(reach)));
  byId("profile").replaceChildren(element("div", { className: plotClass() }, ...cells));
}

// Rows of the lifts of a code; those whose interval is farthest from 1 first.
function liftRows(code) {
  const slot = slots[code];
  if (slot < 0 || !column("lift/value")) return [];
  const rows = [];
  let first = 0; // lifts are ordered by condition, code and level
  H.conditions.forEach(({ name, levels }, c) => {
    levels.forEach((level, i) => {
      const at = first + slot * levels.length + i;
      const [count, value, low, high, found] = ["count", "value", "low", "high", "found"].map(key => column("lift/" + key)[at]);
      const rank = Math.abs(clearance(Math.log(low), Math.log(high), 0));
      rows.push({ name, level, key: "condition/" + c, place: i, count, value, low, high, found: found === 1, rank: Math.min(rank, 9) });
    });
    first += column("profile/codes").length * levels.length;
  });
  return rows.map((row, i) => ({ ...row, i })).sort((a, b) => b.rank - a.rank || b.count - a.count || a.i - b.i);
}

// The conditions of the selected code, or of both codes, those that stand out most first.
function shownLifts() {
  const own = liftRows(state.selected);
  if (state.compared === null) return own.slice(0, 8).map(row => ({ row, rank: row.rank }));
  const other = new Map(liftRows(state.compared).map(row => [row.i, row]));
  const both = own.map(row => ({ row, other: other.get(row.i) })).filter(each => each.other);
  const rank = ({ row, other }) => Math.abs(clearance(Math.log(row.low / other.high), Math.log(row.high / other.low), 0));
  return both.map(each => ({ ...each, rank: Math.min(rank(each) || 0, 9) })).sort((a, b) => b.rank - a.rank || a.row.i - b.row.i).slice(0, 8);
}

function liftsHelp() {
  if (!H.conditions.length) return "The data have no parameters and no labels.";
  const codes = [state.selected, state.compared].filter(code => code !== null).map(codeLabel).join(" and with ");
  const muted = state.compared === null ? "not significant" : "the intervals overlap, or neither is significant";
  return (
    `How much more frequent a condition is among the rows with ${codes} than among all rows, with its 95 % interval; in brackets, the ` +
    `number of rows. 1 is no relation; muted: ${muted}. A click adds the condition to the filter.`
  );
}

const isClear = ({ row, other, rank }) => (other ? rank > 0 && (row.found || other.found) : row.found);

// The conditions that stand out most in words, at most three, with the most frequent value of each that does.
function liftsSummary(rows) {
  const [count, second] = [state.selected, state.compared].map(code => column("code/count")[code ?? 0]);
  if (!count || (state.compared !== null && !second)) return "";  // no row to compare
  const clear = rows.filter(isClear);
  if (!clear.length) return state.compared === null ? "" : "No condition differs clearly between the two codes.";
  const most = new Map();
  for (const each of clear) if (!(most.get(each.row.key)?.row.count >= each.row.count)) most.set(each.row.key, each);
  const parts = [...most.values()].slice(0, 3).map(({ row, other }) => {
    const rest = other ? percent(other.count / second) : percent(levelCounts(Number(row.key.slice(10)))[row.place] / H.rows);
    return `${row.name}: ${row.level} (${percent(row.count / count)} against ${rest})`;
  });
  return `Shares of the rows with ${codeLabel(state.selected)} against ${state.compared === null ? "all rows" : codeLabel(state.compared)}: ${parts.join("; ")}.`;
}

function showLifts() {
  byId("lifts-help").textContent = liftsHelp();
  const rows = shownLifts();
  byId("lifts-summary").textContent = liftsSummary(rows);
  const all = rows.flatMap(({ row, other }) => (other ? [row, other] : [row]));
  const reach = Math.log(Math.max(2, ...all.flatMap(row => [row.high, 1 / row.low]).filter(Number.isFinite).map(v => Math.min(v, 64))));
  const scale = value => 150 + (Math.max(-reach, Math.min(reach, Math.log(value))) / reach) * 146;
  const mark = (row, className, y) => ({ low: Math.max(row.low, 1e-9), high: row.high, at: Math.max(row.value, 1e-9), className, y });
  const cells = rows.flatMap(({ row, other, rank }) => {
    const muted = isClear({ row, other, rank }) ? "" : " muted";
    const counts = [row, other].filter(Boolean).map(each => integer(each.count)).join(" and ");
    const add = element("button", { type: "button", title: "Add to the filter", onclick: () => addToFilter([[row.key, row.place]]) });
    add.append(...breakable(`${row.name}: ${row.level} (${counts})`));
    return [
      element("div", { className: "name" + muted }, add),
      dotPlot(other ? [mark(row, "one", 7), mark(other, "two", 15)] : [mark(row, "one", 11)], scale, 1),
      element("div", { className: "value" + muted, textContent: other
        ? `${number(row.value)} × and ${number(other.value)} ×` : number(row.value) + " ×" + interval(row.low, row.high) }),
    ];
  });
  if (rows.length) cells.push(...axis(number(Math.exp(-reach)), "1", number(Math.exp(reach), 1)));
  byId("lifts").replaceChildren(element("div", { className: plotClass() }, ...cells));
}

function startProfile() {
  const tools = byId("selected-tools");
  const button = (text, onclick) => tools.append(element("button", { type: "button", textContent: text, onclick }));
  button("Add to filter", () => addToFilter([codeTerm(state.selected)]));
  const choice = element("select", { id: "compare" }, element("option", { value: "", textContent: "no other code" }));
  tools.append(element("label", {}, "Compare with ", choice));
  choice.onchange = () => update({ compared: choice.value === "" ? null : Number(choice.value) });
  addCsvButton(tools, "profile", () => [
    ["feature", "kind", "effect", "interval_low", "interval_high", "auc", ...(state.compared === null ? [] : ["effect_compared", "difference"])],
    ...profileRows().map(row => [
      row.name, row.kind, row.effect, row.effect - row.half, row.effect + row.half, row.auc,
      ...(row.other ? [row.other.effect, row.value] : []),
    ]),
  ]);
  addCsvButton(byId("conditions-heading"), "conditions", () => [
    ["condition", "value", "rows", "lift", "lift_low", "lift_high"],
    ...liftRows(state.selected).map(row => [row.name, row.level, row.count, row.value, row.low, row.high]),
  ]);
  const groups = codeGroups();
  let shown = null;
  onChange(() => {
    if (shown !== state.selected) showChoices(choice, groups);
    shown = state.selected;
    choice.value = state.compared === null ? "" : String(state.compared);
    showProfile();
    showLifts();
  });
}

// The codes in use as options, a group for each codebook; made once, as there may be thousands.
function codeGroups() {
  const groups = H.codebooks.map((_, g) => element("optgroup", { label: codebookLabel(g) }));
  column("profile/codes").forEach(code => groups[codebookOf(code)].append(element("option", { value: String(code), textContent: codeLabel(code) })));
  return groups;
}

// The codebook of the selected code first: its codes share no rows.
function showChoices(choice, groups) {
  const own = groups[codebookOf(state.selected)];
  choice.replaceChildren(choice.firstChild, own, ...groups.filter(group => group !== own && group.firstChild));
  for (const option of choice.options) option.disabled = option.value === String(state.selected);
}
