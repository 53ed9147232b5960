"use strict";

// Answers and sources enter the page only as text (textContent, Text nodes), so a document can never add markup.

const byId = (id) => document.getElementById(id);
const MAX_TURNS = 10; // earlier questions that a follow-up question sends along
const ARMS = { rag: "rag: with the documents", base: "base: the model alone", ft: "ft: the fine-tuned model alone",
  "rag+ft": "rag+ft: the fine-tuned model with the documents" };
let pending = null; // the AbortController of the current question
let turns = []; // the conversation: { question, answer } of each answered question

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function showError(message) {
  byId("error").textContent = message;
  byId("error").hidden = !message;
}

async function errorOf(reply) {
  let message = `The endpoint returned status ${reply.status}.`;
  try {
    message = (await reply.json()).error.message;
  } catch { /* not an error object: show the status alone */ }
  const wait = reply.headers.get("Retry-After");
  return new Error(wait ? `${message} (retry in ${wait} s)` : message);
}

async function loadModels() {
  const reply = await fetch("/v1/models", { headers: headers() });
  if (reply.status === 401) {
    byId("key-row").hidden = false;
    byId("state").textContent = "Enter an API key";
    return;
  }
  if (!reply.ok) throw await errorOf(reply);
  const arms = (await reply.json()).data.filter((model) => model.task === "answer").map((model) => model.id);
  const chosen = byId("model").value;
  byId("model").replaceChildren(...arms.map((id) => {
    const option = element("option", ARMS[id] ?? id);
    option.value = id;
    option.selected = id === chosen;
    return option;
  }));
  byId("model").hidden = byId("model-label").hidden = arms.length < 2;
  byId("state").textContent = "Ready";
}

// Splits the text of a source into [text, isCited] pieces. The API counts Unicode characters, JavaScript UTF-16 units.
function pieces(source, citations) {
  const characters = Array.from(source.text);
  const spans = citations
    .filter((cited) => cited.id === source.id)
    .map((cited) => [Math.max(0, cited.start - source.start), Math.min(characters.length, cited.end - source.start)])
    .filter(([start, end]) => start < end)
    .sort((a, b) => a[0] - b[0]);
  const found = [];
  let done = 0;
  for (const [start, end] of spans) {
    if (end <= done) continue;
    const from = Math.max(start, done);
    found.push([characters.slice(done, from).join(""), false], [characters.slice(from, end).join(""), true]);
    done = end;
  }
  found.push([characters.slice(done).join(""), false]);
  return found.filter(([text]) => text);
}

function sourceItem(source, citations) {
  const cited = citations.some((each) => each.id === source.id);
  const item = element("li");
  const details = element("details");
  details.open = cited;
  const summary = element("summary", source.title || source.document_id);
  if (cited) summary.append(element("span", "cited", "badge"));
  const text = element("p");
  for (const [piece, isCited] of pieces(source, citations)) text.append(isCited ? element("mark", piece) : piece);
  const page = source.page ? `, page ${source.page}` : "";
  const place = `${source.document_id}${page}, characters ${source.start} to ${source.end}, score ${source.score.toFixed(3)}`;
  const location = element("p", place, "quiet");
  if (/^https?:\/\//.test(source.url ?? "")) {
    const link = element("a", "open");
    Object.assign(link, { href: source.url, target: "_blank", rel: "noopener noreferrer" });
    location.append(", ", link);
  }
  details.append(summary, text, location);
  item.append(details);
  return item;
}

function showSources(sources, citations) {
  byId("sources").replaceChildren(...sources.map((source) => sourceItem(source, citations)));
  byId("no-sources").hidden = sources.length > 0;
}

function pair(name, value, title) {
  const made = element("div");
  if (title) made.title = title;
  made.append(element("dt", name), element("dd", value));
  return made;
}

function showFacts(chunk) {
  const seconds = (value) => `${value.toFixed(2)} s`;
  const facts = [
    ["Arm", chunk.arm],
    ["Index version", chunk.index_version || "none"],
    ["Retrieval", chunk.retrieved ? seconds(chunk.timings.retrieval_seconds) : "none"],
    ["First token", seconds(chunk.timings.first_token_seconds)],
    ["Generation", seconds(chunk.timings.generation_seconds)],
    ["Model", chunk.generator_name, `fingerprint ${chunk.generator}`],
  ];
  byId("facts").replaceChildren(...facts.map((fact) => pair(...fact)));
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

function conversation(question) {
  const earlier = turns.slice(-MAX_TURNS).flatMap((turn) => [
    { role: "user", content: turn.question }, { role: "assistant", content: turn.answer },
  ]);
  return [...earlier, { role: "user", content: question }];
}

async function ask(question, signal) {
  const body = { messages: conversation(question), model: byId("model").value, stream: true };
  const reply = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!reply.ok) throw await errorOf(reply);
  let sources = [];
  let ended = false;
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") { ended = true; break; }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.sources) {
      sources = chunk.sources;
      showSources(sources, []);
      byId("result").hidden = false;
      byId("asked").scrollIntoView();
    }
    const content = chunk.choices[0]?.delta.content;
    if (content) byId("answer").append(content);
    if (chunk.choices[0]?.finish_reason === "length") byId("cut").hidden = false;
    if (chunk.timings) {
      showFacts(chunk);
      showSources(sources, chunk.citations);
    }
  }
  if (!ended) throw new Error("The answer ended early. Please ask again.");
}

// Moves the last answer to the earlier ones, with its sources closed.
function keepTurn() {
  if (byId("result").hidden || !turns.length || turns.at(-1).kept) return;
  turns.at(-1).kept = true;
  const turn = element("article");
  turn.append(element("h2", turns.at(-1).question, "question"), element("p", turns.at(-1).answer, "answer"));
  const items = Array.from(byId("sources").children, (item) => item.cloneNode(true));
  if (items.length) {
    const details = element("details");
    const list = element("ol", undefined, "sources");
    list.append(...items);
    details.append(element("summary", `Sources (${items.length})`), list);
    turn.append(details);
  }
  byId("earlier").append(turn);
  byId("earlier").hidden = false;
}

function clearResult() {
  byId("result").hidden = true;
  byId("cut").hidden = true;
  for (const name of ["asked", "answer", "facts", "sources"]) byId(name).replaceChildren();
}

function showConversation() {
  byId("question-label").textContent = turns.length ? "Follow-up question" : "Question";
  byId("restart").hidden = !turns.length;
}

function restart() {
  pending?.abort();
  turns = [];
  clearResult();
  byId("earlier").replaceChildren();
  byId("earlier").hidden = true;
  showError("");
  showConversation();
  byId("question").focus();
}

function setBusy(isBusy) {
  byId("send").disabled = isBusy;
  byId("stop").hidden = !isBusy;
  byId("answer").setAttribute("aria-busy", String(isBusy));
}

async function submit(event) {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || pending) return;
  const current = pending = new AbortController();
  showError("");
  keepTurn();
  clearResult();
  byId("asked").textContent = question;
  byId("question").value = "";
  setBusy(true);
  byId("state").textContent = "Answering";
  try {
    await ask(question, current.signal);
    turns.push({ question, answer: byId("answer").textContent });
    byId("state").textContent = "Done";
  } catch (error) {
    byId("state").textContent = error.name === "AbortError" ? "Stopped" : "Failed";
    if (error.name !== "AbortError") showError(error.message);
    byId("question").value ||= question; // so that it can be asked again
  } finally {
    pending = null;
    setBusy(false);
    showConversation();
  }
}

byId("ask").addEventListener("submit", submit);
byId("stop").addEventListener("click", () => pending?.abort());
byId("restart").addEventListener("click", restart);
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("key").addEventListener("change", () => loadModels().catch((error) => showError(error.message)));
loadModels().catch((error) => {
  byId("state").textContent = "Not connected";
  showError(error.message);
});
