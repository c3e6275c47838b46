// The playground: streams a chat and shows what speculation did for every token.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const SHOWN = 5; // depths with a look of their own; deeper ones share the last
const messages = []; // the conversation, without the system prompt
let running = null; // the AbortController of the answer that streams

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawn(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const look = (depth) => (depth ? `d${Math.min(depth, SHOWN)}` : "d0");

function meaning(depth) {
  return depth ? `drafted, accepted at depth ${depth}` : "the target's own";
}

function tell(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

// ---------------------------------------------------------------------------------- the server

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function refusal(answer) {
  const body = await answer.json().catch(() => null);
  return body?.error?.message ?? `the server answered ${answer.status} ${answer.statusText}`;
}

// The model's name; asked again while it loads.
async function greet() {
  try {
    const answer = await fetch("v1/models", { headers: headers() });
    if (answer.status === 401) {
      $("key-field").hidden = false;
      $("model").textContent = "give an API key";
      return;
    }
    if (!answer.ok) throw new Error(await refusal(answer));
    const [model] = (await answer.json()).data;
    const ready = model.max_model_len !== null;
    $("model").textContent = ready ? model.id : `${model.id} is loading`;
    if (!ready) setTimeout(greet, 500);
  } catch (error) {
    $("model").textContent = "away";
    tell(`The server cannot be reached: ${error.message}`);
  }
}

// The objects of an event stream.
async function* events(body) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of pieces(body)) {
    const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function* pieces(body) {
  const reader = body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

function request() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  const system = $("system").value.trim();
  const opening = system ? [{ role: "system", content: system }] : [];
  return {
    messages: [...opening, ...messages],
    temperature: number("temperature"), max_tokens: number("max_tokens"), seed: number("seed"),
    speculation: $("speculation").checked, return_speculation: true, stream: true,
  };
}

// ---------------------------------------------------------------------------------- the answer

// One answer as it grows: its tokens, and the figures beside it.
class Answer {
  constructor(speculation) {
    this.speculation = speculation;
    this.text = "";
    this.tokens = 0;
    this.decoder = new TextDecoder();
    this.words = element("span");
    this.note = element("span", { className: "note" });
    this.turn = element("div", { className: "turn assistant" }, this.words, this.note);
    this.tpc = this.first = this.last = null;
  }

  add(choice) {
    this.text += choice.delta.content ?? "";
    if (choice.depths === undefined) return;
    const now = performance.now();
    this.first ??= { time: now, tokens: choice.depths.length };
    this.last = now;
    this.tokens += choice.depths.length;
    choice.depths.forEach((depth, index) => {
      const bytes = new Uint8Array(choice.bytes[index]);
      const text = this.decoder.decode(bytes, { stream: true });
      const title = meaning(depth);
      const className = `token ${look(depth)}`;
      if (text) this.words.append(element("span", { className, title, textContent: text }));
    });
    if (choice.tree) {
      this.tpc = choice.tokens_per_call;
      showTree(choice.tree);
    }
    this.show();
  }

  // Milliseconds per token after the first chunk's.
  get ttit() {
    const later = this.tokens - (this.first?.tokens ?? 0);
    return later ? (this.last - this.first.time) / later : null;
  }

  show() {
    $("tpc").textContent = this.tpc === null ? "–" : this.tpc.toFixed(2);
    $("ttit").textContent = this.ttit === null ? "–" : `${this.ttit.toFixed(1)} ms`;
    $("count").textContent = this.tokens;
  }

  end(why) {
    const parts = [this.speculation ? "with speculation" : "without speculation"];
    if (this.tpc !== null) parts.push(`TPC ${this.tpc.toFixed(2)}`);
    if (this.ttit !== null) parts.push(`TTIT ${this.ttit.toFixed(1)} ms`);
    parts.push(`${this.tokens} tokens`);
    if (why) parts.push(why);
    this.note.textContent = parts.join(" · ");
  }
}

const ENDS = { length: "cut at max tokens", abort: "given up by the server" };

async function stream(answer, signal) {
  const body = JSON.stringify(request());
  const options = { method: "POST", headers: headers(), body, signal };
  const response = await fetch("v1/chat/completions", options);
  if (response.status === 401) $("key-field").hidden = false;
  if (!response.ok) throw new Error(await refusal(response));
  let end = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const [choice] = event.choices;
    if (!choice) continue;
    const chat = $("chat");
    const following = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 40;
    answer.add(choice);
    end = choice.finish_reason ?? end;
    if (following) chat.scrollTop = chat.scrollHeight;
  }
  if (end === null) throw new Error("the connection ended early");
  return ENDS[end] ?? "";
}

// Answer what the conversation ends with.
async function run() {
  const answer = new Answer($("speculation").checked);
  const controller = new AbortController();
  running = controller;
  buttons();
  tell("");
  $("chat").setAttribute("aria-busy", "true"); // read out when it has ended, not token by token
  $("chat").append(answer.turn);
  $("chat").scrollTop = $("chat").scrollHeight;
  answer.show();
  try {
    answer.end(await stream(answer, controller.signal));
  } catch (error) {
    answer.end(controller.signal.aborted ? "stopped" : "failed");
    if (!controller.signal.aborted) tell(error.message);
  }
  if (running !== controller) return; // a new chat has begun
  if (answer.text) messages.push({ role: "assistant", content: answer.text });
  running = null;
  $("chat").setAttribute("aria-busy", "false");
  buttons();
}

function buttons() {
  $("send").disabled = running !== null;
  $("stop").disabled = running === null;
  $("again").disabled = running !== null || messages.length === 0;
}

function send() {
  const content = $("prompt").value.trim();
  if (running || !content) return;
  $("prompt").value = "";
  messages.push({ role: "user", content });
  $("chat").append(element("div", { className: "turn user", textContent: content }));
  run();
}

function again() {
  if (messages.at(-1).role === "assistant") messages.pop();
  run(); // the answer before stays in sight, to compare with
}

function stop() {
  running?.abort();
  $("prompt").focus();
}

function restart() {
  running?.abort();
  running = null;
  messages.length = 0;
  $("chat").replaceChildren();
  $("chat").setAttribute("aria-busy", "false");
  tell("");
  buttons();
  $("prompt").focus();
}

// ------------------------------------------------------------------------------------ the tree

let shownTree = "";

// Nodes in a grid: a row a depth, a column a leaf; retrieved nodes are dashed.
function showTree({ paths, retrieved }) {
  const now = JSON.stringify([paths, retrieved]);
  if (now === shownTree) return;
  shownTree = now;
  const nodes = paths.map((path) => ({ name: path.join("."), depth: path.length, path }));
  const up = (path) => path.slice(0, -1).join(".");
  const chain = Array.from({ length: retrieved }, (_, at) => ({
    name: `found ${at + 1}`, above: at ? `found ${at}` : "", depth: at + 1, found: true,
  }));
  for (const node of nodes) node.above = up(node.path);
  const all = [{ name: "", depth: 0 }, ...nodes, ...chain];
  let leaves = 0;
  const place = (node) => {
    const below = all.filter((one) => one.above === node.name);
    below.forEach(place);
    node.x = below.length ? (below[0].x + below.at(-1).x) / 2 : leaves++;
  };
  place(all[0]);
  const depth = Math.max(...all.map((node) => node.depth));
  const step = 26;
  const radius = Math.min(8, 160 / leaves);
  const at = (node) => [(node.x + 0.5) * step, (node.depth + 0.5) * step];
  const box = `0 0 ${leaves * step} ${(depth + 1) * step}`;
  const picture = drawn("svg", { viewBox: box, role: "img", "aria-labelledby": "tree-name" });
  for (const node of all.slice(1)) {
    const [x1, y1] = at(all.find((one) => one.name === node.above));
    const [x2, y2] = at(node);
    picture.append(drawn("line", { x1, y1, x2, y2, class: node.found ? "edge found" : "edge" }));
  }
  for (const node of all) {
    const [cx, cy] = at(node);
    picture.append(drawn("circle", { cx, cy, r: radius, class: look(node.depth) }));
  }
  $("tree").replaceChildren(picture);
  const chained = nodes.length === Math.max(0, ...nodes.map((node) => node.depth));
  const deep = nodes.at(-1)?.depth ?? 0;
  const drafted = chained ? `a chain of ${nodes.length}` : `${nodes.length} nodes, ${deep} deep`;
  const name = nodes.length ? drafted : "none: every token is the target's own";
  $("tree-name").textContent = retrieved ? `${name}, and ${retrieved} retrieved` : name;
}

// --------------------------------------------------------------------------------------- begin

for (let depth = 0; depth <= SHOWN; depth++) {
  const textContent = depth === 0 ? "target" : depth === SHOWN ? `${depth} or more` : depth;
  const sign = element("span", { className: look(depth), title: meaning(depth), textContent });
  $("legend").append(element("li", {}, sign));
}
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  tell("");
  greet();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop").addEventListener("click", stop);
$("again").addEventListener("click", again);
$("new").addEventListener("click", restart);
greet();
