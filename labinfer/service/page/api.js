"use strict";
// Small things that everything else uses: elements, the API with its key, light and dark, the two views.

const $ = id => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const key = {
  get: () => sessionStorage.getItem("labinfer-key") || "",
  set: value => sessionStorage.setItem("labinfer-key", value),
};

// A key after "#" in the address never leaves the browser; it is taken out of the address at once.
if (location.hash.startsWith("#key=")) {
  key.set(decodeURIComponent(location.hash.slice(5)));
  history.replaceState(null, "", location.pathname);
}

let asking = null;

// Ask for a key, once however many requests miss it.
function login() {
  asking ??= new Promise(done => {
    $("login").showModal();
    $("login").onclose = () => {
      key.set($("key").value.trim());
      $("key").value = "";
      asking = null;
      done();
    };
  });
  return asking;
}

async function api(path, options = {}) {
  for (;;) {
    const headers = { authorization: `Bearer ${key.get()}`, ...(options.body && { "content-type": "application/json" }) };
    const answer = await fetch(path, { ...options, headers });
    if (answer.status !== 401) return answer;
    await login();
  }
}

// Whom the chat talks to and whose engine is shown: one of what is served, "" until that is known.
const chosen = () => $("models").value;

async function listModels() {
  const { data } = await (await api("/v1/models")).json();
  $("models").replaceChildren(...data.map(({ id }) => element("option", {}, id)));
  $("models").hidden = data.length < 2;
  $("model").hidden = data.length > 1;
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
}
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
$("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

const tabs = [$("tab-chat"), $("tab-engine")];

function show(tab) {
  document.querySelector("main").dataset.view = tab.getAttribute("aria-controls");
  for (const each of tabs) {
    each.setAttribute("aria-selected", each === tab);
    each.tabIndex = each === tab ? 0 : -1;
  }
}
for (const tab of tabs) {
  tab.onclick = () => show(tab);
  tab.onkeydown = event => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const other = tabs[1 - tabs.indexOf(tab)];
      show(other);
      other.focus();
    }
  };
}

const bytes = count => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 999.5 && unit < 4) [count, unit] = [count / 1000, unit + 1];
  return `${count.toFixed(count < 100 && unit ? 1 : 0)} ${units[unit]}`;
};
