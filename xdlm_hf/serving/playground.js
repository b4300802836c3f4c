// The playground: sends its settings to the server, and draws the drafts that come as runs that grow.
const NAMES = ["A", "B"], STARTS = [{mixing_ratio: 0}, {mixing_ratio: 0.1}];
let model = "", key = "", running = null, drawn = 0;

const headers = () => key ? {authorization: "Bearer " + key} : {};
const piece = text => text.replace(/\t/g, "\u21e5").replace(/[\p{C}]/gu, letter => letter === "\n" ? letter : "\u00b7");
const lines = text => text ? text.split(/(?<=\n)/).map(piece) : [];

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The response, or the server's error.
async function ask(path, options = {}) {
  const response = await fetch(path, {...options, headers: {...headers(), ...options.headers}});
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refusal(response.status, body?.error?.message ?? "the server answered with status " + response.status);
}

// The events of a stream until its end. An error event ends it too.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment, which keeps the connection open
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(200, event.error.message);
      yield event;
    }
  }
}

// A run as runs.js draws it, before its first step: given text by lines, then a hole for each token.
function blank(title, prompt, suffix, tokens, steps) {
  const before = lines(prompt), after = lines(suffix), hole = before.length + after.length, start = before.length;
  const first = [...before.keys(), ...Array(tokens).fill(hole), ...after.map((_, i) => start + i)];
  return {
    rows: [{first, steps: [], padding: 0}], counts: [[]], pieces: [...before, ...after, HOLE],
    ids: Array(hole + 1).fill(null), hole, start, end: start + tokens, shift: start,
    kinds: ["filled", "refined", "re-masked"], title, note: "waiting", confident: false, total: steps,
  };
}

// Adds the steps up to a draft: what differs from the state before. Steps that the server left out changed nothing here.
function add(data, draft, state) {
  const {steps} = data.rows[0], gaps = [], values = [], percents = [], counts = [0, 0, 0];
  while (steps.length < draft.step - 1) {
    steps.push([[], [], []]);
    data.counts[0].push([0, 0, 0]);
  }
  let last = 0;
  draft.cells.forEach((cell, i) => {
    if (!state.known.has(cell.id)) {
      state.known.set(cell.id, cell.mask ? data.hole : data.pieces.length);
      if (cell.mask) data.ids[data.hole] = cell.id;
      else {
        data.pieces.push(cell.bytes ?? piece(cell.text));
        data.ids.push(cell.id);
      }
    }
    const now = state.known.get(cell.id), before = state.cells[i];
    if (now === before) return;
    gaps.push(data.start + i - last);
    last = data.start + i;
    values.push(now);
    percents.push(cell.confidence === undefined ? -1 : Math.round(100 * cell.confidence));
    counts[before === data.hole ? 0 : now === data.hole ? 2 : 1]++;
    data.confident ||= cell.confidence !== undefined;
    state.cells[i] = now;
  });
  data.total = draft.steps;
  steps.push([gaps, values, percents]);
  data.counts[0].push(counts);
}

// At most once a frame. The view goes on with the newest step unless it was moved to an earlier one.
function redraw(following) {
  if (following) step = Infinity;
  if (drawn) return;
  drawn = requestAnimationFrame(() => {
    drawn = 0;
    plot();
    show(step);
  });
}

function setting(fieldset) {
  const value = name => fieldset.elements[name].value, options = {};
  for (const name of ["steps", "mixing_ratio", "temperature"]) if (value(name) !== "") options[name] = Number(value(name));
  if (value("sampler")) options.sampler = value("sampler");
  if (value("policy") === "threshold") options.refinement = {policy: "threshold", threshold: Number(value("threshold"))};
  if (value("policy") === "none") options.refinement = "none";
  return options;
}

function title(name, options) {
  const parts = [options.steps + " steps"];
  if (options.mixing_ratio !== undefined) parts.push("k = " + options.mixing_ratio);
  if (options.temperature !== undefined) parts.push("temperature " + options.temperature);
  if (options.sampler) parts.push(options.sampler);
  if (options.refinement) parts.push(options.refinement.threshold ? "edits from " + options.refinement.threshold : "no edits");
  return name + ": " + parts.join(", ");
}

// Runs one setting to its end, or until it is stopped.
async function generate(run, body, path, signal) {
  if (signal.aborted) {
    run.note.textContent = "not started";
    run.data.total = 0;
    return;
  }
  run.note.textContent = "generating";
  const {data} = run, state = {known: new Map(), cells: Array(data.end - data.start).fill(data.hole)};
  const began = performance.now();
  let tokens = 0, reason = "";
  try {
    const response = await ask(path, {
      method: "POST", signal, body: JSON.stringify(body), headers: {"content-type": "application/json"},
    });
    for await (const event of events(response)) {
      if (event.usage) tokens = event.usage.completion_tokens;
      for (const choice of event.choices) {
        reason = choice.finish_reason ?? reason;
        if (!choice.draft) continue;
        const following = step >= length();
        add(data, choice.draft, state);
        redraw(following);
      }
    }
    run.note.textContent = tokens + " tokens in " + run.steps + " steps, "
      + ((performance.now() - began) / 1000).toFixed(2) + " s" + (reason === "stop" ? ", ended by itself" : "");
  } catch (error) {
    run.note.textContent = "ended after step " + run.steps;
    if (error.name !== "AbortError") throw error;
  } finally {
    data.total = 0;
  }
}

async function start() {
  const prompt = get("prompt").value, suffix = get("suffix").value, chat = get("chat").checked;
  const common = {model, stream: true, stream_drafts: true, stream_options: {include_usage: true}};
  common.max_tokens = Number(get("tokens").value);
  if (get("seed").value !== "") common.seed = Number(get("seed").value);
  if (suffix) common.suffix = suffix;
  Object.assign(common, chat ? {messages: [{role: "user", content: prompt}]} : {prompt});
  const all = [...document.querySelectorAll("fieldset")].filter(fieldset => !fieldset.hidden).map(setting);
  play(false);
  get("runs").replaceChildren();
  get("problems").replaceChildren();
  get("results").hidden = false;
  runs = all.map((options, i) =>
    new Run(blank(title(NAMES[i], options), prompt, suffix, common.max_tokens, options.steps), all.length === 1));
  choose(0);
  show(0);
  running = new AbortController();
  busy(true);
  const path = chat ? "v1/chat/completions" : "v1/completions", {signal} = running;
  const failed = [];
  // One after the other, as the server computes them, so that each has its own time.
  for (const [i, run] of runs.entries()) {
    try {
      await generate(run, {...common, ...all[i]}, path, signal);
    } catch (error) {
      failed.push(problem(error, all.length > 1 ? i : -1));
    }
  }
  const following = step >= length();
  get("colour").options[2].disabled = !runs.some(run => run.data.confident);
  step = following ? length() : step;
  choose(0); // the direction of the text may have become known
  const stopped = signal.aborted;
  running = null;
  busy(false);
  get("problems").textContent = failed.join("\n");
  get("status").textContent = stopped ? "Stopped." : failed.length ? "" : "Done. The slider shows every step.";
}

function problem(error, number) {
  if (error.status === 401) askForKey();
  return (number < 0 ? "" : NAMES[number] + ": ") + error.message;
}

// The focus goes from the button that is switched off to the other one.
function busy(on) {
  const [off, other] = on ? [get("generate"), get("stop")] : [get("stop"), get("generate")];
  const focused = document.activeElement === off;
  other.disabled = false;
  if (focused) other.focus();
  off.disabled = true;
  if (on) get("status").textContent = "Generating.";
}

function askForKey() {
  get("access").hidden = false;
  get("key").focus();
}

// Reads the name and the length limit of the model; whether that needs a key shows then.
async function connect() {
  try {
    const {data: [{id, max_model_len: most}]} = await (await ask("v1/models")).json();
    model = id;
    get("note").textContent = "Model " + id + ", at most " + most + " tokens of prompt and answer. Each step's tokens are "
      + "drawn as they are computed; with two settings, one after the other.";
    get("tokens").max = most;
    get("tokens").value = Math.max(1, Math.min(32, Math.floor(most / 2)));
    for (const input of document.querySelectorAll("[name=steps]")) input.value = Math.min(16, get("tokens").value);
    get("access").hidden = true;
    get("problems").replaceChildren();
    get("generate").disabled = false;
  } catch (error) {
    get("note").textContent = "Not connected.";
    get("generate").disabled = true;
    if (error.status === 401) {
      get("refused").textContent = key ? error.message : ""; // the first time the form itself says it
      askForKey();
    } else get("problems").textContent = error.message;
  }
  document.body.dataset.ready = "yes";
}

NAMES.forEach((name, i) => {
  const fieldset = get("setting").content.cloneNode(true).querySelector("fieldset"), {elements} = fieldset;
  fieldset.querySelector("legend").textContent = "Settings " + name;
  for (const [field, value] of Object.entries(STARTS[i])) elements[field].value = value;
  const update = () => { elements.threshold.disabled = elements.policy.value !== "threshold"; };
  elements.policy.addEventListener("change", update);
  update();
  get("settings").append(fieldset);
});
function pair() {
  const on = get("compare").checked;
  document.querySelectorAll("fieldset")[1].disabled = document.querySelectorAll("fieldset")[1].hidden = !on;
  document.querySelector("main").classList.toggle("pair", on);
}
get("compare").addEventListener("change", pair);
get("form").addEventListener("submit", event => { event.preventDefault(); start(); });
get("access").addEventListener("submit", event => { event.preventDefault(); key = get("key").value; connect(); });
get("stop").addEventListener("click", () => running?.abort());
get("rows").hidden = true;
pair();
listen();
connect();
