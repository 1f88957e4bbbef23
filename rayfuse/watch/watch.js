// Reads /state.json again and again and replaces the parts that have changed.
"use strict";

const body = document.body;
const shown = new Map();
let refreshSeconds = Number(body.dataset.refresh);
let readAt = Date.now() - 1000 * Number(body.dataset.age);
let failures = 0;

// The server itself answers within 10 s; a tunnel whose other end has gone never does.
const TIMEOUT_SECONDS = 30;
const MAX_PAUSE_SECONDS = 60;
const RETRY_SECONDS = 2;

function setText(id, text) {
  const element = document.getElementById(id);
  if (element.textContent !== text) element.textContent = text;
}

function showAge() {
  const seconds = Math.max(0, Math.round((Date.now() - readAt) / 1000));
  setText("age", `Read ${seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`} ago.`);
}

function replacePart(name, html) {
  const part = document.querySelector(`[data-part="${name}"]`);
  if (part === null || shown.get(name) === html) return;
  const regions = [...part.querySelectorAll(".wide")];
  const lefts = regions.map((region) => region.scrollLeft);
  const focused = regions.indexOf(document.activeElement);
  const open = [...part.querySelectorAll("details")].map((details) => details.open);
  part.innerHTML = html;
  shown.set(name, html);
  const renewed = [...part.querySelectorAll(".wide")];
  renewed.forEach((region, number) => { region.scrollLeft = lefts[number] ?? 0; });
  if (focused >= 0) renewed[focused]?.focus({ preventScroll: true });
  [...part.querySelectorAll("details")].forEach((details, number) => {
    details.open = open[number] ?? details.open;
  });
}

async function update() {
  try {
    const answer = await fetch("/state.json", {
      cache: "no-store", signal: AbortSignal.timeout(1000 * TIMEOUT_SECONDS),
    });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    const state = await answer.json();
    failures = 0;
    readAt = Date.now() - 1000 * state.age_seconds;
    refreshSeconds = state.refresh_seconds;
    for (const [name, html] of Object.entries(state.parts)) replacePart(name, html);
    setText("written", state.written);
    setText("trouble", state.fault ?? "");
    setText("announcement", state.announcement);
  } catch (error) {
    failures += 1;
    if (failures > 1) {
      setText("trouble", "rayfuse watch does not answer (has it ended?); the numbers are old.");
    }
  }
  showAge();
  const pause = failures === 0 ? refreshSeconds : RETRY_SECONDS * 2 ** Math.min(failures - 1, 5);
  setTimeout(update, 1000 * Math.min(pause, MAX_PAUSE_SECONDS));
}

setInterval(showAge, 1000);
setTimeout(update, 1000 * Math.min(refreshSeconds, 2));
