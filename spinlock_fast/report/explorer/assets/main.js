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
  for (const panel of [startFilter, startCodes, startProfile, startExamples, startOverview, startMap]) panel();
  layoutMap();
  update({ selected: mostDistinctCode(), ...readHash() });
  document.documentElement.dataset.ready = "yes";
}

start().catch(error => {
  byId("failure").hidden = false;
  byId("failure").textContent = `The page cannot be shown: ${error.message}`;
});
