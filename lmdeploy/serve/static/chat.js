// The chat page: asks /v1/chat/completions and shows the answer as it comes. The text of a model becomes text nodes only.

const $ = (id) => document.getElementById(id);
const state = { turns: [], running: null };

// ---- asking ----

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function problemOf(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? body.message ?? response.statusText;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    showSettings(true);
    $("key").focus();
    throw new Error("This server asks for an API key: type it above.");
  }
  if (!response.ok) throw new Error(await problemOf(response));
  for (const box of document.querySelectorAll(".notice")) box.remove();
  $("empty").hidden = $("log").querySelector(".turn") !== null;
  const names = (await response.json()).data.map((card) => card.id);
  const chosen = $("models").value;
  $("models").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  $("models").hidden = names.length < 2;
  $("model").textContent = names.length === 1 ? names[0] : "LMDeploy";
  document.title = `${names.length === 1 ? names[0] : "Chat"} · LMDeploy`;
}

function requestBody() {
  const system = $("system").value.trim();
  return JSON.stringify({
    model: $("models").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...state.turns],
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    top_k: Number($("top_k").value),
    max_tokens: Math.max(1, Math.floor(Number($("max_tokens").value)) || 512),
    stream: true,
    stream_options: { include_usage: true },
  });
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function answer(box, signal) {
  const found = { text: "", thought: "", reason: null, usage: null };
  let isDrawn = true;
  const draw = () => {
    isDrawn = true;
    const isAtEnd = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
    render(box, found);
    if (isAtEnd) $("log").scrollTop = $("log").scrollHeight;
  };
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: requestBody(), signal });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of eventsOf(response)) {
      found.usage = event.usage ?? found.usage;
      const choice = event.choices?.[0];
      found.text += choice?.delta?.content ?? "";
      found.thought += choice?.delta?.reasoning_content ?? "";
      found.reason = choice?.finish_reason ?? found.reason;
      if (isDrawn) {
        isDrawn = false;
        requestAnimationFrame(draw);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") found.error = error.message;
    else found.reason = "stopped";
  }
  requestAnimationFrame(draw);
  return found;
}

async function send(text) {
  if (!$("models").value) await loadModels();
  state.turns.push({ role: "user", content: text });
  addTurn("user").textContent = text;
  const box = addTurn("assistant");
  box.classList.add("busy");
  $("log").scrollTop = $("log").scrollHeight;
  const running = new AbortController();
  setRunning(running);
  const found = await answer(box, running.signal);
  box.classList.remove("busy");
  if (state.running !== running) return; // the conversation was reset meanwhile
  setRunning(null);
  if (found.text) state.turns.push({ role: "assistant", content: found.text });
  else state.turns.pop();
}

// ---- showing ----

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function addTurn(role) {
  $("empty").hidden = true;
  const box = element("div");
  box.className = `turn ${role}`;
  $("log").append(box);
  return box;
}

function render(box, found) {
  const isOpen = box.querySelector("details")?.open ?? false;
  const parts = [];
  if (found.thought) {
    const thought = element("details", element("summary", "Thoughts"), ...paragraphs(found.thought));
    thought.className = "thought";
    thought.open = isOpen;
    parts.push(thought);
  }
  parts.push(...blocks(found.text));
  const notes = [];
  if (found.reason === "length") notes.push("ended by the maximum of tokens");
  if (found.reason === "stopped") notes.push("stopped");
  if (found.usage) notes.push(`${found.usage.prompt_tokens} + ${found.usage.completion_tokens} tokens`);
  if (notes.length) parts.push(note(notes.join(" · ")));
  if (found.error) {
    box.classList.add("failed");
    parts.push(element("p", found.error));
  }
  box.replaceChildren(...parts);
}

function note(text) {
  const node = element("p", text);
  node.className = "note";
  return node;
}

const paragraphs = (text) => text.trim().split(/\n{2,}/).map((part) => element("p", ...lines(part)));
const lines = (text) => text.split("\n").flatMap((line, number) => (number ? [element("br"), ...spans(line)] : spans(line)));

// A little Markdown: fenced code, headings, lists, paragraphs.
function blocks(text) {
  const found = [];
  text.split(/^```/m).forEach((part, number) => {
    if (number % 2) {
      const code = part.includes("\n") ? part.slice(part.indexOf("\n") + 1) : "";
      found.push(element("pre", element("code", code.replace(/\n$/, ""))));
    } else {
      found.push(...textBlocks(number ? part.replace(/^[^\n]*\n?/, "") : part));
    }
  });
  return found;
}

function textBlocks(text) {
  const found = [];
  let open = null; // the list or paragraph that the next line may go on
  for (const line of text.split("\n")) {
    const item = line.match(/^\s*(?:([-*+])|(\d{1,4})[.)])\s+(.*)$/);
    const heading = line.match(/^#{1,6}\s+(.*)$/);
    if (item) {
      const kind = item[1] ? "UL" : "OL";
      if (open?.nodeName !== kind) {
        open = element(kind);
        if (kind === "OL") open.start = Number(item[2]);
        found.push(open);
      }
      open.append(element("li", ...spans(item[3])));
    } else if (heading) {
      found.push(element("h3", ...spans(heading[1])));
      open = null;
    } else if (!line.trim()) {
      if (open?.nodeName === "P") open = null;
    } else if (open?.nodeName === "P") {
      open.append(element("br"), ...spans(line));
    } else {
      open = element("p", ...spans(line));
      found.push(open);
    }
  }
  return found;
}

// Code, bold and italics within a line.
function spans(line) {
  return line
    .split(/(`[^`]+`|\*\*[^*]+\*\*|\*[^*\s][^*]*\*)/)
    .filter(Boolean)
    .map((part) => {
      if (/^`[^`]+`$/.test(part)) return element("code", part.slice(1, -1));
      if (/^\*\*[^*]+\*\*$/.test(part)) return element("strong", part.slice(2, -2));
      if (/^\*[^*\s][^*]*\*$/.test(part)) return element("em", part.slice(1, -1));
      return document.createTextNode(part);
    });
}

// ---- controls ----

function setRunning(running) {
  state.running = running;
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
}

function reset() {
  state.running?.abort();
  setRunning(null);
  state.turns = [];
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("prompt").focus();
}

function showSettings(isShown) {
  $("settings").hidden = !isShown;
  $("toggle").setAttribute("aria-expanded", String(isShown));
}

function tell(error) {
  const box = addTurn("assistant");
  box.classList.add("notice");
  render(box, { text: "", error: error.message });
}

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

async function submit(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || state.running) return;
  try {
    if (!$("models").value) await loadModels();
  } catch (error) {
    tell(error);
    return;
  }
  $("prompt").value = "";
  grow();
  await send(text);
}

$("form").addEventListener("submit", submit);
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
$("stop").addEventListener("click", () => state.running?.abort());
$("reset").addEventListener("click", reset);
$("toggle").addEventListener("click", () => showSettings($("settings").hidden));
$("key").value = sessionStorage.getItem("lmdeploy-key") ?? "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("lmdeploy-key", $("key").value.trim());
  loadModels().catch(tell);
});
for (const output of document.querySelectorAll("output")) {
  const input = $(output.htmlFor[0]);
  const show = () => (output.value = input.value);
  input.addEventListener("input", show);
  show();
}
loadModels().catch(tell);
