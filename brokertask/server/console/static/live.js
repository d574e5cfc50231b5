// Keeps a page up to date: hears that something has happened, asks for the page again, and takes
// over what has changed. Rows are changed where they stand, and none comes or goes by itself.
const PAUSE = 1000;
const TRIES = 12;
const AGAIN = 3; // How often a page is asked for that does not say up to when it is.
const ENDS = ["completed", "failed", "expired", "cancelled"];
const EVENTS = ["changed", "started", "step", "log", "progress", "warning", "retrying", "sleeping", "waiting", ...ENDS];

export function follow(main) {
  const source = new EventSource(main.dataset.live);
  let wanted = 0; // The instant of the latest event that the page does not show yet.
  let tries = 0;
  let timer = null;
  let over = false;

  const plan = (pause) => { timer ??= setTimeout(refresh, pause); };
  const heard = (event) => {
    const told = JSON.parse(event.data);
    wanted = Math.max(wanted, told.at_ms ?? 0);
    tries = "at" in main.dataset ? TRIES : AGAIN;
    over ||= "data-at" in main.attributes && ENDS.includes(event.type);
    if (over) source.close();
    plan(PAUSE / 4);
  };

  async function refresh() {
    timer = null;
    if (document.hidden && !over) return plan(PAUSE);
    const shown = await again(main);
    tries -= 1;
    // The history is written a moment behind what is told.
    if (tries > 0 && (shown === null || shown < wanted)) plan(PAUSE);
  }

  for (const name of EVENTS) source.addEventListener(name, heard);
  // What was missed while there was no stream is on the page.
  source.addEventListener("open", () => { tries = AGAIN; plan(0); });
  source.addEventListener("lost", () => { tries = AGAIN; plan(PAUSE); });
}

// Takes over what has changed, and returns the instant of the latest that the page knows of.
export async function again(main) {
  let answer;
  try {
    answer = await fetch(main.dataset.refresh, { headers: { accept: "text/html" } });
  } catch {
    return null;
  }
  if (!answer.ok || answer.redirected) return null;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.querySelector("main");
  for (const part of main.querySelectorAll("[data-part]")) {
    const next = fresh.querySelector(`[data-part="${CSS.escape(part.dataset.part)}"]`);
    if (next && next.innerHTML !== part.innerHTML && !busy(part)) part.innerHTML = next.innerHTML;
  }
  rows(main, fresh);
  const at = fresh.dataset.at;
  main.dispatchEvent(new CustomEvent("refreshed"));
  return at === undefined ? null : Number(at);
}

// Nothing is taken from under somebody's hands.
function busy(part) {
  const active = document.activeElement;
  if (part.querySelector("details[open] form")) return true;
  return part.contains(active) && active.matches("input, textarea, select, button");
}

function rows(main, fresh) {
  const list = main.querySelector("[data-list]");
  if (!list) return;
  const found = (page) => new Map([...page.querySelectorAll("[data-row]")].map((row) => [row.dataset.row, row]));
  const shown = found(main);
  const next = found(fresh);
  if (shown.size === 0) {
    // Nothing is under anybody's hands.
    list.innerHTML = fresh.querySelector("[data-list]").innerHTML;
    return;
  }
  for (const [id, row] of shown) {
    const newer = next.get(id);
    row.toggleAttribute("data-gone", !newer);
    if (newer && newer.innerHTML !== row.innerHTML && !row.querySelector("input:checked")) {
      row.innerHTML = newer.innerHTML;
    }
  }
  const chip = main.querySelector("[data-fresh]");
  if (!chip) return;
  const late = [...next.keys()].filter((id) => !shown.has(id)).length;
  const count = Number(fresh.querySelector("[data-fresh]").dataset.fresh) + late;
  chip.textContent = `${count} new ↑`;
  chip.hidden = count === 0;
}
