// Reads the data, fills the header, and starts the panels.

function showFacts() {
  const parts = [
    `Checkpoint ${H.checkpoint}${H.sha256 ? " (" + H.sha256.slice(0, 12) + ")" : ""}`,
    `${counted(H.rows, "row")} of ${H.data}`,
    `${counted(H.categories.length, "category", "categories")}, ${counted(H.codebooks.length, "codebook")}, ${counted(offsets.at(-1), "code")} ` +
      `(${integer(column("profile/codes").length)} in use)`,
  ];
  if (H.quality !== null) parts.push(`quality ${number(H.quality, 3)} on ${H.measured_on}`);
  byId("facts").textContent = parts.join(" · ");
  byId("notes").replaceChildren(...H.notes.map(note => element("li", { textContent: note })));
  byId("notes-panel").hidden = !H.notes.length;
}

const PANELS = [["Codes", "codes-panel"], ["Profile", "profile-panel"], ["Examples", "examples-panel"], ["Map", "map-panel"], ["Coarse to fine", "tree-panel"], ["Conditions", "associations-panel"]];

function goButton(text, panel) {
  return element("button", { type: "button", textContent: text, onclick: () => byId(panel).scrollIntoView() });
}

// The last value of the condition that the tokens tell best, as text.
function exampleCondition() {
  const { conditions, ami } = H.associations;
  const best = H.conditions.map(({ name }) => Math.max(...ami.filter((_, i) => conditions[i % conditions.length] === name)));
  const found = H.conditions[best.indexOf(Math.max(...best))];
  return found ? `${found.name}: ${found.levels.at(-1)}` : "";
}

// What can be asked, each with how.
function showQuestions() {
  const [name, short] = [H.categories[0].name, H.categories[0].short];
  const value = exampleCondition();
  const questions = [
    ["What does a code mean? ", "Choose it in the table, or search for ", `${short}=2`, name === short ? "." : ` (${short} is ${name}).`],
    ["What distinguishes two codes? ", "Search for ", `${short}=2 vs 3`, ", or choose one and the other under Compare with."],
    ...(value ? [["Which code marks a condition? ", "Choose a value under Condition, such as ", value, ": the codes are ranked by overlap."]] : []),
    ["Which code has a high or low feature? ", "Choose the feature above the table of codes."],
    ["What is a typical row of a code" + (value ? " and a condition? " : "? "), "Search for ", value ? `${short}=2 ${value}` : `${short}=2`, "; Most typical row opens it."],
  ];
  byId("questions").replaceChildren(...questions.map(([question, how, example, rest]) =>
    element("li", {}, element("strong", { textContent: question }), how, ...(example ? [element("code", { textContent: example }), rest] : []))));
}

// The code, of those with at least 2 % of the rows, with the effect whose interval is farthest from 0.
function mostDistinctCode() {
  const [effects, halves, codes] = ["effect", "half_width", "codes"].map(name => column("profile/" + name));
  const counts = column("code/count");
  const few = Math.min(0.02 * H.rows, codes.reduce((most, code) => Math.max(most, counts[code]), 0));
  let [best, largest] = [codes[0], 0];
  for (let i = 0; i < effects.length; i++) {
    const code = codes[Math.floor(i / H.features.length)];
    const distance = Math.abs(effects[i]) - halves[i];
    if (distance > largest && counts[code] >= few) [best, largest] = [code, distance];
  }
  return best;
}

async function start() {
  if (typeof DecompressionStream === "undefined") throw new Error("This page needs a browser of 2023 or later.");
  setData(await unpack(byId("data").textContent));
  byId("data").remove();
  byId("main").hidden = false;
  showFacts();
  showQuestions();
  for (const panel of [startFilter, startCodes, startProfile, startExamples, startSeries, startOverview, startMap]) panel();
  byId("go").replaceChildren("Go to: ", ...PANELS.filter(each => !byId(each[1]).hidden).map(each => goButton(...each)));
  layoutMap();
  const linked = readHash();
  update({ selected: mostDistinctCode(), unchosen: linked.selected === undefined, ...linked });
  document.documentElement.dataset.ready = "yes";
}

start().catch(error => {
  byId("failure").hidden = false;
  byId("failure").textContent = `The page cannot be shown: ${error.message}`;
});
