"use strict";

let shown = null; // the question on the page
let skipped = []; // places that the person skipped
let visited = []; // places to which "Back" returns
let busy = false;

// The text of a passage, with its evidence marked; spans are [start, end) in it, counted in code points.
function passageBlock(passage) {
  const block = element("article");
  block.append(element("h4", passage.title));
  const text = element("p");
  text.dir = "auto";
  const letters = Array.from(passage.text);
  let place = 0;
  for (const [start, end] of passage.spans) {
    if (start < place) continue;
    text.append(letters.slice(place, start).join(""), element("mark", letters.slice(start, end).join("")));
    place = end;
  }
  text.append(letters.slice(place).join(""));
  block.append(text);
  return block;
}

function show(found) {
  shown = found.place === null ? null : found;
  byId("item").hidden = !shown;
  byId("end").hidden = Boolean(shown);
  byId("state").textContent = `${found.done} of ${found.total} decided, by ${found.reviewer}`;
  byId("back").disabled = !visited.length;
  if (!shown) {
    const left = found.total - found.done;
    byId("end-title").textContent = left ? `${left} left` : "All are decided";
    byId("end-text").textContent = `Accepted and mended questions are in ${found.path}. Press Ctrl-C where the command runs.`;
    byId("again").hidden = !left;
    byId("end-title").focus();
    return;
  }
  byId("kind").textContent = `${found.place + 1}: ${found.kind}`;
  byId("history").replaceChildren(...found.history.map((turn) => element("p", `${turn.role}: ${turn.content}`)));
  byId("question").value = found.text;
  byId("answers").value = found.answers.join("\n");
  byId("answers").placeholder = found.answers.length ? "" : "no document answers it";
  byId("decided").textContent = found.verdict ? `${found.verdict} before; a new decision replaces it` : "";
  byId("passages").replaceChildren(...found.passages.map(passageBlock));
  byId("kind").focus();
  window.scrollTo(0, 0);
}

// Runs one step at a time, and shows its error.
async function step(action) {
  if (busy) return;
  busy = true;
  try {
    show(await action());
    byId("error").hidden = true;
  } catch (error) {
    byId("error").textContent = error.message;
    byId("error").hidden = false;
  } finally {
    busy = false;
  }
}

const following = () => post("/item", { skipped });
const given = () => byId("answers").value.split("\n").map((line) => line.trim()).filter(Boolean);

function decide(verdict) {
  step(async () => {
    const text = byId("question").value.trim();
    const mended = text !== shown.text || given().join("\n") !== shown.answers.join("\n");
    const said = verdict === "accepted" && mended ? "mended" : verdict;
    await post("/decide", { place: shown.place, item: shown.item, verdict: said, text, answers: given() });
    visited.push(shown.place);
    return following();
  });
}

function skip() {
  if (busy) return;
  skipped.push(shown.place);
  visited.push(shown.place);
  step(following);
}

function back() {
  if (busy || !visited.length) return;
  const place = visited.pop();
  skipped = skipped.filter((each) => each !== place);
  step(() => post("/item", { place, skipped }));
}

byId("form").addEventListener("submit", (event) => { event.preventDefault(); decide("accepted"); });
byId("reject").addEventListener("click", () => decide("rejected"));
byId("skip").addEventListener("click", skip);
byId("back").addEventListener("click", back);
byId("again").addEventListener("click", () => { skipped = []; step(following); });

document.addEventListener("keydown", (event) => {
  const writing = event.target instanceof HTMLTextAreaElement;
  if (writing && event.key === "Escape") byId("kind").focus();
  if (writing && event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); if (shown) decide("accepted"); }
  if (writing || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = { a: () => decide("accepted"), r: () => decide("rejected"), s: skip, b: back, e: () => byId("question").focus() }[event.key];
  if (!action || (!shown && event.key !== "b")) return;
  event.preventDefault();
  action();
});

step(following);
