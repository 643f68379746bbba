// What the engine is and does: where the model lies, how full its cache is, and what each step took.

const STEPS = 120;
const steps = [];
let after = null;

function meter(parts, total) {
  const bar = element("div", { class: "meter" });
  parts.forEach(([, value], index) => {
    const part = element("i", { class: `fill-${index % 4}` });
    part.style.width = `${(100 * value) / total}%`;
    if (value) bar.append(part);
  });
  return bar;
}

function legend(parts) {
  const found = element("p", { class: "legend muted" });
  parts.forEach(([name, value], index) => {
    if (value) found.append(element("span", {}, element("i", { class: `key fill-${index % 4}` }), `${name} ${bytes(value)}`));
  });
  return found;
}

let computed = { at: 0, tokens: 0, rate: 0 };

// Tokens that the engine computes a second, since the last look.
function countTokens(tokens) {
  const at = performance.now() / 1000, { at: before, tokens: had } = computed;
  if (at - before > 0.4) computed = { at, tokens, rate: before ? Math.max(0, tokens - had) / (at - before) : 0 };
}

// What a stage sends on.
function traffic({ target, bytes_per_token }) {
  const rate = bytes_per_token * computed.rate;
  return element("p", { class: "muted mono" }, `→ ${target}: ${bytes(bytes_per_token)} a token, ${bytes(rate)}/s`);
}

function host({ name, address, state, round_trip_seconds }) {
  const there = round_trip_seconds === null ? "" : ` · ${milliseconds(round_trip_seconds)} there and back`;
  return element("div", { class: "host" },
    element("p", { class: "name" }, element("span", {}, name), element("span", { class: `state ${state}` }, state)),
    element("p", { class: "muted mono" }, address + there));
}

const start = ({ time, seconds, hosts, loaded, kept }) => element("p", { class: "muted mono" },
  `${new Date(1000 * time).toLocaleTimeString()} started on ${[...new Set(hosts)].join(", ")}: ${bytes(loaded)} loaded, ${bytes(kept)} kept, ${seconds.toFixed(1)} s`);

// Stages below the host that they are on, and how the stages came there, the latest first.
function placement({ stages, hosts, links, starts }) {
  const shown = each => stage(each, links.filter(link => link.source === each.device).map(traffic));
  const grouped = hosts.flatMap(each => [host(each), ...stages.filter(one => one.host === each.name).map(shown)]);
  return hosts.length ? [...grouped, element("div", { class: "starts" }, ...starts.slice(-5).reverse().map(start))] : stages.map(shown);
}

function stage(found, sending) {
  const { weights, kv_cache, arena, ...others } = found.bytes;
  const { swap, ...rest } = others;
  const more = Object.values(rest).reduce((sum, value) => sum + value, 0);
  const parts = [["weights", weights], ["KV cache", kv_cache], ["arena", arena], ["other", more]];
  const total = weights + kv_cache + arena + more;
  const layers = found.layers ? `layers ${found.layers[0]}–${found.layers[1]}` : "";
  const packing = found.arena.optimal ? "no smaller arena exists" : `arena at least ${bytes(found.arena.lower_bound)}`;
  return element("div", { class: "stage" },
    element("p", { class: "name" }, element("span", {}, found.device), element("span", {}, layers)),
    element("p", { class: "muted mono" }, found.description),
    meter(parts, total), legend(parts),
    element("p", { class: "muted mono" }, `${bytes(total)} in all · ${packing}`), ...sending);
}

function showDevices(found) {
  const { model, cache, limits } = found;
  $("model").textContent = model;
  document.title = `${model} · LABInfer`;
  $("facts").textContent = `${limits.max_model_len} tokens of context · ${limits.max_num_seqs} sequences a step`;
  countTokens(found.tokens);
  $("stages").replaceChildren(...placement(found));
  const used = cache.groups.map(each => {
    const taken = each.num_blocks - each.free_blocks;
    const name = each.window ? `window of ${each.window}` : "all tokens";
    return element("div", {}, meter([["used", taken]], each.num_blocks),
      element("p", { class: "muted mono" }, `${taken} of ${each.num_blocks} blocks of ${cache.block_size} tokens · ${name}`));
  });
  $("cache").replaceChildren(...used);
  $("planned").textContent = Object.entries(found.plan_steps.predicted).map(([phase, seconds]) => {
    const measured = found.plan_steps.measured[phase];
    return `planned ${phase} step: ${milliseconds(seconds)} predicted, ${measured === undefined ? "not measured yet" : `${milliseconds(measured)} measured`}`;
  }).join("; ");
  showNow(found);
}

function showNow({ running, waiting, cache }) {
  const end = after ?? 0, recent = steps.filter(each => each.time > end - 2);
  const tokens = recent.reduce((sum, each) => sum + each.num_decodes, 0);
  const span = recent.length ? recent.at(-1).time - recent[0].time + recent[0].seconds : 0;
  const values = {
    running, waiting, "tokens/s": running && span ? (tokens / span).toFixed(0) : "–", "cache used": `${(100 * cache.usage).toFixed(0)} %`,
  };
  $("now").replaceChildren(...Object.entries(values).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
}

function drawSteps() {
  const svg = $("timeline"), shown = steps.slice(-STEPS), width = 600 / STEPS;
  const most = Math.max(...shown.map(each => Math.max(each.seconds, each.predicted_seconds ?? 0)), 1e-6);
  const make = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const height = seconds => (140 * seconds) / most;
  const bars = shown.map((each, index) => make("rect", {
    x: index * width, width: width - 0.8, y: 150 - height(each.seconds), height: height(each.seconds),
    class: each.num_tokens > each.num_decodes ? "prompt" : "decode",
  }));
  const line = shown.flatMap((each, index) => each.predicted_seconds === null ? [] :
    [`${index * width},${150 - height(each.predicted_seconds)} ${(index + 1) * width},${150 - height(each.predicted_seconds)}`]);
  svg.replaceChildren(...bars, make("polyline", { points: line.join(" "), class: "predicted" }));
  if (shown.length) tellStep(shown.at(-1));
}

const milliseconds = value => `${(1000 * value).toLocaleString("en", { maximumSignificantDigits: 3 })} ms`;

function tellStep(step) {
  const predicted = step.predicted_seconds === null ? "" : `, ${milliseconds(step.predicted_seconds)} predicted`;
  const many = (count, name) => `${count} ${name}${count === 1 ? "" : "s"}`;
  $("step").textContent = `${many(step.num_tokens, "token")} of ${many(step.num_sequences, "sequence")}: ${milliseconds(step.seconds)}${predicted}`;
}

$("timeline").onpointermove = event => {
  const box = $("timeline").getBoundingClientRect();
  const step = steps.slice(-STEPS)[Math.floor(((event.clientX - box.left) / box.width) * STEPS)];
  if (step) tellStep(step);
};

$("models").onchange = () => {
  steps.length = 0;
  computed.at = 0;
  after = null;
  drawSteps();
  $("step").textContent = "No step yet.";
};

async function look() {
  if (!document.hidden) {
    try {
      if (!chosen()) await listModels();
      const model = chosen(), query = `?model=${encodeURIComponent(model)}`;
      const trace = await (await api(`/labinfer/v1/trace${query}${after === null ? "" : `&after=${after}`}`)).json();
      const devices = await (await api(`/labinfer/v1/devices${query}`)).json();
      if (model !== chosen()) return setTimeout(look, 0);
      steps.push(...trace.steps);
      steps.splice(0, steps.length - 1024);
      after = steps.at(-1)?.time ?? after;
      if (trace.steps.length) drawSteps();
      showDevices(devices);
      if ($("status").textContent === "the server does not answer") $("status").textContent = "";
    } catch {
      $("status").textContent = "the server does not answer";
    }
  }
  setTimeout(look, running ? 500 : 2000);
}
look();
$("prompt").focus();
