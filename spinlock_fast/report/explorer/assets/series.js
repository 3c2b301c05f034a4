// Time series of a row, over the range of all rows. Levels are 0..254 along the axis, 255 where a value is not finite.

const MOST_SERIES = 6;
const MOST_LINES = 5; // of other rows
let seriesPlace = null; // row -> its place among those with series
let shownSeries = []; // indices of the series on the panel
let seriesExamples = { nearest: [] };

const hasSeries = at => {
  seriesPlace ??= new Map([...column("series/rows")].map((row, i) => [row, i]));
  return seriesPlace.has(at);
};

function seriesLevels(index, at) {
  const count = H.series.series[index].steps.length;
  const place = seriesPlace.get(at);
  return column("series/" + index).subarray(place * count, (place + 1) * count);
}

// Series in the order in which the selected code differs from all rows, or from the compared code.
function rankedSeries() {
  const count = H.series.series.length;
  const value = (name, code, i) => column("series/" + name)[slots[code] * count + i];
  if (slots[state.selected] < 0) return [];
  const rank = state.compared !== null && slots[state.compared] >= 0
    ? i => Math.abs(value("shift", state.selected, i) - value("shift", state.compared, i))
    : i => value("strength", state.selected, i);
  return [...Array(count).keys()].sort((a, b) => rank(b) - rank(a) || a - b);
}

// A path of segments; a gap where a value is missing.
function linePath(points) {
  let pen = "M";
  return points.map(([x, y]) => {
    if (!Number.isFinite(y)) {
      pen = "M";
      return "";
    }
    const segment = `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
    return segment;
  }).join("");
}

function seriesPlot(index, { at, others, second }) {
  const { name, low, high, steps, length } = H.series.series[index];
  const [width, height, count] = [240, 84, steps.length];
  const x = i => (steps[i] / Math.max(length - 1, 1)) * width;
  const y = value => 2 + (1 - Math.max(0, Math.min(1, (value - low) / (high - low || 1)))) * (height - 4);
  const band = [0, 1, 2].map(part => [...column(`series/${index}/band`).subarray(part * count, (part + 1) * count)].map((value, i) => [x(i), y(value)]));
  const line = (row, className) => {
    const own = [...seriesLevels(index, row)].map((level, i) => [x(i), level === 255 ? NaN : 2 + (1 - level / 254) * (height - 4)]);
    return svg("path", { class: className, d: linePath(own), "vector-effect": "non-scaling-stroke" });
  };
  const label = `${name}: row ${column("rows")[at]} over the range of the rows`;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  const area = [...band[0], ...band[2].reverse()].filter(([, value]) => Number.isFinite(value));
  plot.append(svg("path", { class: "band", d: area.length ? linePath(area) + "Z" : "" }));
  plot.append(svg("path", { class: "median", d: linePath(band[1]), "vector-effect": "non-scaling-stroke" }));
  plot.append(...others.map(row => line(row, "faint")), ...(second === undefined ? [] : [line(second, "two")]), line(at, "one"));
  const ends = element("div", { className: "ends muted" }, element("span", { textContent: short(high) }), element("span", { textContent: short(low) }));
  const range = element("div", { className: "steps muted" }, element("span", { textContent: "step 0" }), element("span", { textContent: String(length - 1) }));
  return element("figure", {}, element("figcaption", {}, ...breakable(name)), ends, plot, range);
}

function seriesHelp({ at, others, second, chosen }) {
  if (at === undefined) {
    const kept = column("series/rows").length;
    return kept < H.rows ? `Time series are kept of ${integer(kept)} rows, examples of the codes, and of none of these rows.` : "";
  }
  const row = `Row ${column("rows")[at]}${chosen ? "" : `, the most typical of ${codeLabel(state.selected)}`}`;
  const compared = second === undefined ? "" : `; orange: row ${column("rows")[second]} of ${codeLabel(state.compared)}`;
  const more = others.length ? `; thin: ${counted(others.length, "further example")}` : "";
  return (
    `${row}${more}${compared}. Grey: the range of ${H.series.band_rows < H.rows ? `${integer(H.series.band_rows)} evenly spaced` : "all"} ` +
    "rows from 10 % to 90 %, and their median. Values beyond the axis are at its edge. Point at another example to see its series."
  );
}

// The row to show: the one that the pointer is on, the chosen one, or the first example with series.
function seriesRows() {
  const { nearest, first, second } = seriesExamples;
  const chosen = [marked, pinned].find(row => row !== null && hasSeries(row));
  const at = chosen ?? first;
  return { at, chosen: chosen !== undefined, others: nearest.filter(row => row !== at).slice(0, MOST_LINES - 1), second };
}

// Examples with series: nearest ones and the first one of the selected code, and the first one of the compared code.
function findSeriesExamples() {
  const known = code => exampleRows(code).filter(each => hasSeries(each.at));
  const own = known(state.selected);
  const nearest = own.filter(each => each.kind === "nearest").map(each => each.at);
  seriesExamples = { nearest, first: own[0]?.at, second: state.compared === null ? undefined : known(state.compared)[0]?.at };
}

function showSeries() {
  if (!H.series) return;
  const rows = seriesRows();
  const choice = byId("one-series").value;
  const indices = choice === "" ? rankedSeries().slice(0, MOST_SERIES) : [Number(choice)];
  byId("series-help").textContent = seriesHelp(rows);
  for (const id of ["series-heading", "series-controls"]) byId(id).hidden = rows.at === undefined;
  shownSeries = rows.at === undefined ? [] : indices;
  byId("series").className = choice === "" ? "" : "single";
  byId("series").replaceChildren(...shownSeries.map(index => seriesPlot(index, rows)));
}

function seriesTable() {
  const { at } = seriesRows();
  const rows = [["row", "series", "step", "value", "quantile_10", "median", "quantile_90"]];
  for (const index of shownSeries) {
    const { name, low, high, steps } = H.series.series[index];
    const band = column(`series/${index}/band`);
    seriesLevels(index, at).forEach((level, i) => {
      const value = level === 255 ? NaN : low + (level / 254) * (high - low);
      rows.push([column("rows")[at], name, steps[i], value, ...[0, 1, 2].map(part => band[part * steps.length + i])]);
    });
  }
  return rows;
}

function startSeries() {
  if (!H.series) {
    byId("series-help").textContent = "No time series: the features have no value per time step.";
    for (const id of ["series-heading", "series-controls"]) byId(id).hidden = true;
    return;
  }
  const select = byId("one-series");
  const options = H.series.series.map(({ name }, i) => [name, i]).sort((a, b) => NAMES.compare(a[0], b[0]));
  select.append(element("option", { value: "", textContent: "those that differ most" }), ...options.map(([textContent, i]) => element("option", { value: String(i), textContent })));
  select.onchange = showSeries;
  addCsvButton(byId("series-heading"), "series", seriesTable);
  onChange(() => {
    findSeriesExamples();
    showSeries();
  });
}
