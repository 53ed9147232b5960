"use strict";

// What the pages of this machine share. Texts enter a page only as text, so a document can never add markup.

const byId = (id) => document.getElementById(id);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// The reply to a JSON body; the command that serves the page is named in its <html>.
async function post(path, body) {
  let reply;
  try {
    reply = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  } catch {
    const command = document.documentElement.dataset.command;
    throw new Error(`${command} has ended or cannot be reached. Start it again, and reload this page.`);
  }
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error.message);
  return found;
}
