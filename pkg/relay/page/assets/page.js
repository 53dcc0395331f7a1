// Updates the overview while it is open, and selects all rows of a list. Every action of
// the page works without this script.
"use strict";

const all = document.querySelector("input.all");
if (all) {
  all.hidden = false;
  all.addEventListener("change", () => {
    for (const box of document.querySelectorAll('input[name="id"]')) box.checked = all.checked;
  });
}

if (document.getElementById("verdict")) {
  const liveness = document.getElementById("liveness");
  const announcement = document.getElementById("announcement");
  const say = (text) => { liveness.textContent = text; liveness.hidden = false; };
  const waiting = {}; // sections that changed while the reader was in them
  let healthy;

  const show = (name) => {
    const section = document.getElementById(name);
    if (section.contains(document.activeElement)) return;
    const table = section.querySelector(".scroll");
    const left = table ? table.scrollLeft : 0;
    section.innerHTML = waiting[name];
    delete waiting[name];
    const scrolled = section.querySelector(".scroll");
    if (scrolled) scrolled.scrollLeft = left;
  };

  const events = new EventSource("/live");
  events.onmessage = (event) => {
    const now = JSON.parse(event.data);
    Object.assign(waiting, now.sections);
    for (const name of Object.keys(waiting)) show(name);
    say("Live. Last update " + new Date().toISOString().slice(11, 19) + " UTC.");
    // A screen reader hears changes of the verdict, not each new figure.
    if (healthy !== undefined && healthy !== now.healthy) announcement.textContent = now.verdict;
    healthy = now.healthy;
  };
  events.onerror = () => {
    say(events.readyState === EventSource.CLOSED
      ? "Not live. Reload the page."
      : "Not live: this relay does not respond. These figures are old. Trying again.");
  };
}
