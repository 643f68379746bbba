// The conversation: messages, streamed answers, stop and regenerate.

const conversation = [];
let running = null;

// Text of a model is never HTML: code between backquotes and bold are elements, all else is text.
function formatted(text) {
  const found = document.createDocumentFragment();
  text.split(/^```/m).forEach((part, index) => {
    if (index % 2) {
      const code = part.includes("\n") ? part.slice(part.indexOf("\n") + 1) : "";
      found.append(element("pre", { tabindex: 0 }, element("code", {}, code.replace(/\n$/, ""))));
      return;
    }
    for (const piece of part.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
      if (/^`.+`$/.test(piece)) found.append(element("code", {}, piece.slice(1, -1)));
      else if (/^\*\*.+\*\*$/.test(piece)) found.append(element("strong", {}, piece.slice(2, -2)));
      else found.append(piece);
    }
  });
  return found;
}

function addMessage(role, text) {
  $("hint").hidden = true;
  const body = element("div", { class: "body" }, formatted(text));
  const measured = element("div", { class: "measured" });
  const message = element("article", { class: `message ${role}`, "aria-label": role === "user" ? "You" : "Model" }, body, measured);
  $("messages").append(message);
  message.scrollIntoView({ block: "end" });
  return { message, body, measured };
}

function parameters() {
  const form = new FormData($("composer"));
  const found = {};
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if (form.get(name) !== "") found[name] = Number(form.get(name));
  }
  const system = form.get("system").trim();
  return { found, messages: system ? [{ role: "system", content: system }, ...conversation] : [...conversation] };
}

// The data of server-sent events, one value each.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function figures(began, first, tokens, end) {
  if (first === null) return "";
  const parts = [`first token ${((first - began) / 1000).toFixed(2)} s`, `${tokens} tokens`];
  if (tokens > 1 && end > first) parts.push(`${((tokens - 1) / ((end - first) / 1000)).toFixed(1)} tokens/s`);
  return parts.join(" · ");
}

async function answer() {
  const { found, messages } = parameters();
  const shown = addMessage("assistant", "");
  const stop = running = new AbortController();
  setRunning(true);
  const began = performance.now();
  let text = "", first = null, tokens = 0, last = began, reason = null, failure = null;
  try {
    const body = { model: chosen() || undefined, messages, ...found, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
    const reply = await api("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: stop.signal });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Error(chunk.error.message);
      tokens = chunk.usage?.completion_tokens ?? tokens;
      const choice = chunk.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      if (!choice.delta.content) continue;
      first ??= performance.now();
      last = performance.now();
      text += choice.delta.content;
      const list = $("messages");
      const follow = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
      shown.body.replaceChildren(formatted(text));
      shown.measured.textContent = figures(began, first, tokens, last);
      if (follow) list.scrollTop = list.scrollHeight;
    }
  } catch (error) {
    failure = stop.signal.aborted ? "stopped" : error.message;
  }
  if (running !== stop) return;
  const told = [figures(began, first, tokens, last), failure === "stopped" ? failure : reason === "length" ? "cut at the limit" : ""];
  shown.measured.textContent = told.filter(Boolean).join(" · ");
  if (failure && failure !== "stopped") {
    shown.message.classList.add("failed");
    shown.body.textContent = failure;
  } else {
    conversation.push({ role: "assistant", content: text });
  }
  running = null;
  setRunning(false);
}

function setRunning(on) {
  $("send").textContent = on ? "Stop" : "Send";
  $("send").classList.toggle("stop", on);
  $("again").hidden = on || !conversation.length;
  $("status").textContent = on ? "answering" : "";
}

function say(text) {
  conversation.push({ role: "user", content: text });
  addMessage("user", text);
  answer();
}

$("composer").onsubmit = event => {
  event.preventDefault();
  if (running) return running.abort();
  const text = $("prompt").value.trim();
  if (!text) return;
  $("prompt").value = "";
  grow();
  say(text);
};

$("again").onclick = () => {
  if (conversation.at(-1)?.role === "assistant") conversation.pop();
  const last = $("messages").lastElementChild;
  if (last.classList.contains("assistant")) last.remove();
  answer();
};

$("fresh").onclick = () => {
  running?.abort();
  running = null;
  conversation.length = 0;
  for (const each of document.querySelectorAll(".message")) each.remove();
  $("hint").hidden = false;
  setRunning(false);
  $("prompt").focus();
};

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}
$("prompt").oninput = grow;
$("prompt").onkeydown = event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
};
document.onkeydown = event => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "/" && !/INPUT|TEXTAREA/.test(event.target.tagName)) {
    event.preventDefault();
    $("prompt").focus();
  }
};
