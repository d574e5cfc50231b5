// The timeline of a run: a row for each span, of which only those in sight are in the page.
const ROW = 24;
const SPARE = 8;
const SHORT = 2000; // ms: what takes no longer is drawn as long as it is.
const IDLE = 0.04; // What is left of a stretch in which nothing runs, as a part of the whole.

const element = (name, className, parent) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  parent?.append(made);
  return made;
};

export function words(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  const units = [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]];
  let left = Math.round(ms / 1000);
  let text = "";
  for (const [unit, size] of units) {
    const count = Math.floor(left / size);
    left -= count * size;
    if (count) text += `${count}${unit}`;
  }
  return text;
}

// Maps instants to parts of the width; stretches in which nothing runs are cut short.
function scale(spans, now, collapsed) {
  const end = (span) => span.until ?? now;
  const first = Math.min(...spans.slice(0, 1).map((span) => span.since), ...[now]);
  let last = first + 1;
  for (const span of spans) last = Math.max(last, end(span), span.since);
  const busy = spans.filter((span) => span.kind === "attempt" || span.kind === "step");
  const pieces = [];
  let at = first;
  if (collapsed) {
    const long = Math.max(SHORT, (last - first) * IDLE * 2);
    const waits = spans.filter((span) => span.kind !== "attempt" && span.kind !== "step" && end(span) - span.since > long);
    for (const wait of waits) {
      const from = Math.max(at, wait.since);
      const until = end(wait);
      if (until - from <= long || busy.some((span) => span.kind === "step" && span.since < until && end(span) > from)) continue;
      pieces.push([at, from, false], [from, until, true]);
      at = until;
    }
  }
  pieces.push([at, last, false]);
  const idle = pieces.filter((piece) => piece[2]).length;
  const total = pieces.reduce((sum, [from, until, cut]) => sum + (cut ? 0 : until - from), 0) || 1;
  const room = 1 - idle * IDLE;
  let place = 0;
  const placed = pieces.map(([from, until, cut]) => {
    const width = cut ? IDLE : ((until - from) / total) * room;
    place += width;
    return [from, until, place - width, width];
  });
  const where = (instant) => {
    for (const [from, until, start, width] of placed) {
      if (instant <= until) return start + (until > from ? (Math.max(0, instant - from) / (until - from)) * width : 0);
    }
    return 1;
  };
  return { where, first, last, cuts: placed.filter((_, index) => pieces[index][2]) };
}

class Timeline extends HTMLElement {
  connectedCallback() {
    this.bar = element("p", "timeline-bar", this);
    this.errors = this.#choice("errors only", false);
    this.collapse = this.#choice("cut waits short", true);
    this.told = element("span", "note", this.bar);
    this.axis = element("div", "timeline-axis", this);
    this.port = element("div", "timeline-port", this);
    this.port.tabIndex = 0;
    this.port.setAttribute("role", "region");
    this.port.setAttribute("aria-label", "Spans");
    this.tall = element("div", "timeline-tall", this.port);
    this.pool = [];
    this.spans = [];
    this.port.addEventListener("scroll", () => this.#soon(), { passive: true });
    new ResizeObserver(() => this.#soon()).observe(this.port);
    this.closest("main").addEventListener("refreshed", () => this.load());
    setInterval(() => { if (this.spans.some((span) => span.until === null)) this.lay(); }, 1000);
    this.load();
  }

  async load() {
    const answer = await fetch(this.getAttribute("src")).catch(() => null);
    if (!answer?.ok) return;
    const { now, spans } = await answer.json();
    this.skew = now - Date.now();
    this.spans = spans.map(([depth, kind, label, status, since, until, note]) => ({ depth, kind, label, status, since, until, note }));
    this.lay();
  }

  lay() {
    const now = Date.now() + this.skew;
    const failed = (span) => span.status === "failed" || (span.kind === "attempt" && span.status === "retrying");
    this.rows = this.errors.checked ? this.spans.filter(failed) : this.spans;
    this.now = now;
    this.scale = scale(this.spans, now, this.collapse.checked);
    this.port.style.height = `${Math.min(18, Math.max(2, this.rows.length + 0.5)) * ROW}px`;
    this.tall.style.height = `${this.rows.length * ROW}px`;
    this.told.textContent = `${this.rows.length} of ${this.spans.length} spans, ${words(this.scale.last - this.scale.first)}`;
    this.#marks();
    this.#soon();
  }

  #choice(text, checked) {
    const label = element("label", "", this.bar);
    const box = element("input", "", label);
    box.type = "checkbox";
    box.checked = checked;
    label.append(` ${text}`);
    box.addEventListener("change", () => this.lay());
    return box;
  }

  #marks() {
    this.axis.replaceChildren();
    const track = element("div", "timeline-track", this.axis);
    const { where, first, last, cuts } = this.scale;
    for (let part = 0; part <= 4; part += 1) {
      const instant = first + ((last - first) * part) / 4;
      const place = where(instant);
      if (cuts.some(([, , start, width]) => place > start && place < start + width)) continue;
      const mark = element("span", "", track);
      mark.textContent = words(instant - first);
      mark.style.left = `${Math.min(place, 0.94) * 100}%`;
    }
    for (const [from, until, start, width] of cuts) {
      const cut = element("i", "timeline-cut", track);
      cut.title = `${words(until - from)} are cut short`;
      cut.style.left = `${start * 100}%`;
      cut.style.width = `${width * 100}%`;
    }
  }

  #soon() {
    this.frame ??= requestAnimationFrame(() => { this.frame = null; this.#draw(); });
  }

  #draw() {
    if (!this.rows) return;
    const first = Math.max(0, Math.floor(this.port.scrollTop / ROW) - SPARE);
    const count = Math.min(this.rows.length - first, Math.ceil(this.port.clientHeight / ROW) + 2 * SPARE);
    while (this.pool.length < count) this.pool.push(this.#row());
    this.pool.forEach((row, index) => {
      row.whole.hidden = index >= count;
      if (index < count) this.#fill(row, this.rows[first + index], (first + index) * ROW);
    });
  }

  #row() {
    const whole = element("div", "timeline-row", this.tall);
    const name = element("span", "timeline-name", whole);
    const track = element("span", "timeline-track", whole);
    return { whole, name, track, bar: element("i", "", track), note: element("span", "timeline-note", track) };
  }

  #fill(row, span, top) {
    const { where } = this.scale;
    const until = span.until ?? this.now;
    const left = where(span.since);
    row.whole.style.transform = `translateY(${top}px)`;
    if (row.span === span && row.scale === this.scale) return;
    row.span = span;
    row.scale = this.scale;
    const took = words(Math.max(0, until - span.since));
    row.whole.className = `timeline-row depth-${span.depth} kind-${span.kind} status-${span.status}`;
    row.whole.classList.toggle("going", span.until === null);
    row.whole.title = `${span.label}: ${span.status}, ${took}${span.note ? `\n${span.note}` : ""}`;
    row.name.textContent = span.label;
    row.bar.style.left = `${left * 100}%`;
    row.bar.style.width = `${Math.max(0, where(until) - left) * 100}%`;
    row.note.textContent = span.note ? `${took} · ${span.note}` : took;
    const right = where(until);
    const place = right < 0.75 ? "behind" : left > 0.3 ? "before" : "inside";
    row.note.className = `timeline-note ${place}`;
    row.note.style.left = place === "before" ? "auto" : `calc(${(place === "behind" ? right : left) * 100}% + 6px)`;
    row.note.style.right = place === "before" ? `calc(${(1 - left) * 100}% + 6px)` : "0";
  }
}

customElements.define("bt-timeline", Timeline);
