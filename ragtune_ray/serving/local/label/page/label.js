"use strict";

const WORDS = [["wrong", 0], ["partly", 0.5], ["right", 1]];
const KEYS = [["1", "2", "3"], ["7", "8", "9"]]; // of the first and of the second answer
let shown = null; // the item on the page
let skipped = []; // places that the person skipped
let visited = []; // places to which "Back" returns
let busy = false;

function choice(number, [word, grade], key, given) {
  const label = element("label");
  const input = element("input");
  Object.assign(input, { type: "radio", name: `grade-${number}`, value: grade, checked: given === grade });
  label.append(input, word, element("kbd", key));
  return label;
}

function answerField(text, number) {
  const field = element("fieldset");
  const name = shown.answers.length === 1 ? "Answer" : ["First answer", "Second answer"][number];
  const grades = element("div", undefined, "grades");
  grades.append(...WORDS.map((word, place) => choice(number, word, KEYS[number][place], shown.grades[number])));
  const answer = element("p", text.trim() ? text : "(no answer)", text.trim() ? "answer" : "answer quiet");
  answer.dir = "auto";
  field.append(element("legend", name), answer, grades);
  return field;
}

function sourceItem(source) {
  const item = element("li");
  const details = element("details");
  details.open = shown.golds === null; // without a gold answer the sources must be read
  const text = element("p", source.text);
  text.dir = "auto";
  details.append(element("summary", source.title), text);
  item.append(details);
  return item;
}

function showGolds(golds) {
  const line = byId("golds");
  line.replaceChildren();
  if (golds === null) line.append("No gold answer is known: grade by the sources.");
  else if (!golds.length) line.append("The documents contain no answer: it is right to say so.");
  else golds.forEach((gold, number) => line.append(number ? ", or " : "Gold answer: ", element("bdi", gold)));
}

function chosen() {
  return shown.answers.map((_, number) => document.querySelector(`input[name=grade-${number}]:checked`)?.value);
}

function update() {
  byId("next").disabled = busy || chosen().includes(undefined);
  byId("undo").disabled = !visited.length;
}

function show(found) {
  shown = found.place === null ? null : found;
  byId("item").hidden = !shown;
  byId("end").hidden = Boolean(shown);
  byId("state").textContent = `${found.done} of ${found.total} labelled by ${found.labeller}`;
  if (!shown) {
    const left = found.total - found.done;
    byId("end-title").textContent = left ? `${left} left` : "All are labelled";
    byId("end-text").textContent = `The labels are in ${found.path}. Press Ctrl-C where ragtune label runs, and compare again.`;
    byId("again").hidden = !left;
    byId("last").hidden = !visited.length;
    byId("end-title").focus();
    return;
  }
  byId("history").replaceChildren(...found.history.map((turn) => element("p", `${turn.role}: ${turn.content}`)));
  byId("query").textContent = found.query;
  showGolds(found.golds);
  byId("answers").replaceChildren(...found.answers.map(answerField));
  const keys = found.answers.length === 1 ? "1 2 3 grade the answer" : "1 2 3 grade the first answer, 7 8 9 the second";
  byId("hint").textContent = `Keys: ${keys}, Enter next, s skip, u back.`;
  byId("sources").replaceChildren(...found.sources.map(sourceItem));
  byId("no-sources").hidden = found.sources.length > 0;
  byId("query").focus();
  window.scrollTo(0, 0);
  update();
}

// Runs one step at a time, and shows its error.
async function step(action) {
  if (busy) return;
  busy = true;
  try {
    const found = await action();
    busy = false;
    byId("error").hidden = true;
    show(found);
  } catch (error) {
    busy = false;
    byId("error").textContent = error.message;
    byId("error").hidden = false;
    if (shown) update();
  }
}

const following = () => post("/item", { skipped });

function next() {
  const grades = chosen();
  if (grades.includes(undefined)) return;
  step(async () => {
    await post("/label", { place: shown.place, item: shown.item, grades: grades.map(Number) });
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

function undo() {
  if (!visited.length || busy) return;
  const place = visited.pop();
  skipped = skipped.filter((each) => each !== place);
  step(() => post("/item", { place }));
}

function again() {
  skipped = [];
  step(following);
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const key = event.key.toLowerCase();
  if (key === "u") undo();
  if (!shown) return;
  if (key === "s") skip();
  if (key === "enter" && !["BUTTON", "SUMMARY", "A"].includes(event.target.tagName)) {
    event.preventDefault();
    next();
  }
  KEYS.slice(0, shown.answers.length).forEach((keys, number) => {
    const place = keys.indexOf(key);
    if (place < 0) return;
    document.querySelectorAll(`input[name=grade-${number}]`)[place].checked = true;
    update();
  });
}

byId("grading").addEventListener("submit", (event) => { event.preventDefault(); next(); });
byId("grading").addEventListener("change", update);
byId("skip").addEventListener("click", skip);
byId("undo").addEventListener("click", undo);
byId("last").addEventListener("click", undo);
byId("again").addEventListener("click", again);
document.addEventListener("keydown", press);
step(following);
