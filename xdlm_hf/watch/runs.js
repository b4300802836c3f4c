"use strict";
// Runs shown step by step: one, or two side by side that share slider, row and colours. A page fills `runs`, then
// calls `choose`. Its runs may grow: `data.total` is set while they do.
const KINDS = ["filled", "refined", "remasked"], HOLE = "\u2581", PNG = "data:image/png;base64,";
const LEFT = 34, BASE = 152, HEIGHT = 132; // of the plot, in pixels
const get = id => document.getElementById(id);
let runs = [], row = 0, step = 0, colour = "change", timer = null;

function tag(name, text) {
  const span = document.createElement("span");
  span.className = name;
  span.textContent = text;
  return span;
}

function shape(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Colour of a share in [0, 1] on the scale of commit order or confidence.
function shade(share) {
  const space = colour === "order" ? "oklch" : "oklab"; // by way of green; straight to the card's colour
  return `color-mix(in ${space}, var(--${colour}-last) ${100 * share}%, var(--${colour}-first))`;
}

const strict = new TextDecoder("utf-8", {fatal: true});

class Run {
  constructor(data, only) {
    this.data = data;
    this.at = {row: -1, step: 0};
    const root = get("run").content.cloneNode(true), find = name => root.querySelector(name);
    [this.legend, this.text, this.svg] = [find(".legend"), find(".text"), find("svg")];
    find("h2").textContent = data.title;
    find("h2").hidden = only;
    this.note = find(".note");
    this.note.textContent = data.note;
    this.label = only ? "" : data.title + ": ";
    this.text.setAttribute("aria-label", this.label + (data.images ? "image" : "text") + " after this step");
    get("runs").append(root);
    this.listen();
  }

  listen() {
    this.svg.addEventListener("click", event => {
      play(false);
      show(Math.ceil((event.clientX - this.svg.getBoundingClientRect().left - LEFT) / this.slot));
    });
    this.text.addEventListener("keydown", event => {
      if (!(event.key in KEYS) || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      if (event.key !== " ") play(false);
      KEYS[event.key]();
      event.preventDefault();
    });
  }

  get steps() { return this.data.rows[row].steps.length; }

  // Steps that there will be at most, while the run goes on (`data.total`).
  get total() { return Math.max(this.steps, this.data.total ?? 0); }

  // The state after `to` steps, and what its last step did. Going forward goes on from the state at hand.
  go(to) {
    const {first, steps} = this.data.rows[row];
    if (this.at.row !== row || this.at.step > to) {
      const length = first.length;
      this.at = {row, step: 0, ids: first.slice(), since: new Int32Array(length), sure: new Int8Array(length).fill(-1)};
    }
    const at = this.at;
    if (at.step < to || to === 0) at.kind = {};
    while (at.step < to) {
      const [gaps, values, percents] = steps[at.step++];
      let position = 0;
      at.kind = {};
      for (let i = 0; i < gaps.length; i++) {
        position += gaps[i];
        const before = at.ids[position], after = values[i];
        at.kind[position] = before === this.data.hole ? "filled" : after === this.data.hole ? "remasked" : "refined";
        at.ids[position] = after;
        at.since[position] = at.step;
        at.sure[position] = percents ? percents[i] : -1;
      }
    }
    return at;
  }

  // As tokens.TokenPieces.units: tokens that hold parts of a character are shown together, four at most.
  unit(ids, first) {
    const pieces = this.data.pieces;
    if (typeof pieces[ids[first]] === "string") return [first + 1, pieces[ids[first]]];
    let bytes = [];
    for (let last = first; last < Math.min(first + 4, ids.length); last++) {
      const piece = pieces[ids[last]];
      if (typeof piece === "string") break;
      bytes = bytes.concat(piece);
      try { return [last + 1, strict.decode(new Uint8Array(bytes))]; } catch (error) { /* not whole yet */ }
    }
    return [first + 1, "\ufffd"];
  }

  // Direction of the text: that of the first letter with one, after the last step.
  direction() {
    const {ids} = this.go(this.steps);
    let whole = "";
    for (let first = this.data.rows[row].padding; first < ids.length;) {
      const [last, text] = this.unit(ids, first);
      whole += text;
      first = last;
    }
    this.text.dir = "auto";
    this.text.textContent = whole;
    return getComputedStyle(this.text).direction;
  }

  // The image after this step: open cells are hatched, and each cell that the step changed has a frame.
  picture(state) {
    const [rows, columns] = this.data.grid, parts = document.createElement("div"), image = new Image();
    parts.className = "picture";
    image.src = PNG + this.data.images[row][state.step];
    image.alt = "image after step " + state.step;
    parts.append(image);
    const mark = (cell, kind, title) => {
      const span = tag(kind, "");
      span.title = title;
      span.style.cssText = "left:" + 100 * (cell % columns) / columns + "%;top:" + 100 * Math.floor(cell / columns) / rows
        + "%;width:" + 100 / columns + "%;height:" + 100 / rows + "%";
      parts.append(span);
    };
    const cells = rows * columns; // channels of pixels follow each other
    const open = new Set(state.ids.flatMap((id, i) => id === this.data.hole ? [i % cells] : []));
    for (const cell of open) mark(cell, "open", "not drawn yet");
    for (const [position, kind] of Object.entries(state.kind)) {
      mark(position % cells, kind, "position " + position + ", token " + this.data.ids[state.ids[position]] + ", " + kind);
    }
    return parts;
  }

  words(state) {
    const parts = document.createDocumentFragment();
    for (let first = this.data.rows[row].padding; first < state.ids.length;) {
      const [last, text] = this.unit(state.ids, first);
      parts.append(this.word(state, first, last, text));
      first = last;
      // One break after a row of line breaks, which an early draft is full of.
      if (text.endsWith("\n") && (first === state.ids.length || !this.unit(state.ids, first)[1].startsWith("\n"))) {
        parts.append("\n");
      }
    }
    return parts;
  }

  word(state, first, last, text) {
    let kind = "", since = 0, sure = 100;
    for (let i = first; i < last; i++) {
      kind = kind || state.kind[i] || "";
      since = Math.max(since, state.since[i]);
      sure = Math.min(sure, state.sure[i]);
    }
    const {start, end = Infinity, shift = 0} = this.data;
    const open = state.ids[first] === this.data.hole, prompt = first < start || first >= end;
    const span = tag(kind || (prompt ? "prompt" : open ? "hole" : ""), text.replaceAll("\n", "\u21b5"));
    if (/^\n+$/.test(text) && !span.className) span.className = "hole";
    const share = open ? -1 : colour === "order" && since ? since / this.steps : colour === "confidence" ? sure / 100 : -1;
    if (share >= 0) {
      span.classList.add("shaded");
      span.style.background = shade(share);
    }
    const ids = state.ids.slice(first, last).map(id => this.data.ids[id]);
    if (ids.includes(null)) return span; // given text that is not split into its tokens
    span.title = "position " + (first - shift) + ", token " + ids.join(", ") + (since ? ", since step " + since : "")
      + (sure >= 0 && !open ? ", confidence " + sure + " %" : "");
    return span;
  }

  draw() {
    const state = this.go(Math.min(step, this.steps));
    this.text.replaceChildren(this.data.images ? this.picture(state) : this.words(state));
    const counts = state.step ? this.data.counts[row][state.step - 1] : [0, 0, 0];
    const holes = state.ids.reduce((sum, id, i) => sum + (id === this.data.hole && i >= this.data.start), 0);
    const parts = KINDS.map((kind, i) => tag(kind, counts[i] + " " + this.data.kinds[i]));
    parts.push(tag("hole", holes + (this.data.images ? "" : " " + HOLE) + " open"));
    if (step > this.steps) parts.push(tag("hole", (this.data.total ? "at step " : "done after step ") + this.steps));
    if (colour !== "change" && !this.data.images) parts.push(this.ramp());
    this.legend.replaceChildren(...parts);
    this.mark(state.step);
    return this.label + counts.map((count, i) => count + " " + this.data.kinds[i]).join(", ");
  }

  ramp() {
    const ends = colour === "order" ? ["step 1", "step " + this.steps] : ["0 %", "100 %"];
    const span = tag("ramp", ""), bar = document.createElement("i");
    bar.style.background = "linear-gradient(to right," + [0, 0.25, 0.5, 0.75, 1].map(shade).join(",") + ")";
    span.append(ends[0], bar, ends[1]);
    return span;
  }

  // A frame around the bar of a step and a pointer above it, in front of the bars.
  mark(now) {
    const [frame, pointer] = this.svg.querySelectorAll(".now, .pointer");
    const width = Math.max(this.slot, 4), left = LEFT + (now - 0.5) * this.slot - width / 2, middle = left + width / 2;
    frame.setAttribute("x", left);
    frame.setAttribute("width", width);
    pointer.setAttribute("d", `M${middle - 6},2h12l-6,10z`);
    for (const node of [frame, pointer]) node.setAttribute("visibility", now ? "visible" : "hidden");
  }

  // Bars of all steps; `columns` and `top`, the largest number of steps and the highest bar, are those of all runs.
  plot(columns, top) {
    const width = Math.max(40, this.svg.clientWidth - LEFT - 8), counts = this.data.counts[row], nodes = [];
    this.slot = width / columns;
    const gap = this.slot > 6 ? 1 : 0;
    counts.forEach((values, i) => {
      let y = BASE;
      values.forEach((value, kind) => {
        if (!value) return;
        const height = value / top * HEIGHT;
        y -= height;
        nodes.push(shape("rect", {class: KINDS[kind], x: LEFT + i * this.slot + gap, y, width: this.slot - 2 * gap, height}));
      });
    });
    nodes.push(shape("line", {class: "axis", x1: LEFT, x2: LEFT + width, y1: BASE, y2: BASE}));
    nodes.push(shape("text", {x: LEFT - 6, y: BASE - HEIGHT + 9, "text-anchor": "end"}, top));
    nodes.push(shape("text", {x: LEFT - 6, y: BASE, "text-anchor": "end"}, 0));
    nodes.push(shape("text", {x: LEFT, y: BASE + 16}, "step 1"));
    nodes.push(shape("text", {x: LEFT + width, y: BASE + 16, "text-anchor": "end"}, "step " + columns));
    nodes.push(shape("rect", {class: "now", y: BASE - HEIGHT - 6, height: HEIGHT + 6}), shape("path", {class: "pointer"}));
    this.svg.replaceChildren(...nodes);
    this.svg.setAttribute("aria-label", this.label + "tokens changed per step, at most "
      + Math.max(...counts.map(c => c[0] + c[1] + c[2])) + " in one of " + this.steps + " steps");
  }
}

const length = () => Math.max(...runs.map(run => run.steps)), total = () => Math.max(...runs.map(run => run.total));

function show(to) {
  step = Math.max(0, Math.min(to, length()));
  const done = runs.map(run => run.draw());
  get("slider").max = total();
  get("slider").value = step;
  get("step").textContent = "step " + step + " of " + total();
  get("slider").setAttribute("aria-valuetext", "step " + step + " of " + total() + ", " + done.join("; "));
}

function plot() {
  const top = Math.max(1, ...runs.flatMap(run => run.data.counts[row].map(c => c[0] + c[1] + c[2])));
  for (const run of runs) run.plot(Math.max(1, total()), top);
}

function play(on) {
  clearInterval(timer);
  timer = null;
  if (on) {
    if (step === length()) show(0);
    timer = setInterval(() => {
      show(step + 1);
      if (step === length()) play(false);
    }, Math.max(40, Math.min(400, 12000 / length())));
  }
  get("play").textContent = on ? "\u275a\u275a Pause" : "\u25b6 Play";
}

function choose(to) {
  row = to;
  for (const run of runs) if (!run.data.images) run.text.dir = run.direction();
  plot();
  show(step);
}

// Only for the text that has the focus: elsewhere the keys keep their usual meaning.
const KEYS = {
  ArrowLeft: () => show(step - 1), ArrowRight: () => show(step + 1), Home: () => show(0), End: () => show(Infinity),
  " ": () => play(timer === null),
};

function listen() {
  get("slider").addEventListener("input", event => { play(false); show(Number(event.target.value)); });
  get("row").addEventListener("change", event => choose(Number(event.target.value)));
  get("colour").addEventListener("change", event => { colour = event.target.value; show(step); });
  get("play").addEventListener("click", () => play(timer === null));
  window.addEventListener("resize", () => { if (runs.length) { plot(); show(step); } });
}
